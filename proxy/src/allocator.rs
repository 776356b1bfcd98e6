//! When the allocator gives memory back to the system.
//!
//! jemalloc keeps what was freed for ten seconds and then gives it back little by little, when something is allocated: right for
//! a busy proxy, and never for one that fell idle. So the workers say when a lot was freed and is not needed soon.
#![allow(unsafe_code)] // jemalloc's control interface is a C function

use std::ptr::null_mut;

/// Gives what is free back to the system, of all threads. Milliseconds after a lot was freed: for when there is nothing to do.
pub(crate) fn give_back() {
    // SAFETY: the name ends with NUL; the control takes no value and returns none, as the null pointers say. 4096 is
    // MALLCTL_ARENAS_ALL. Where jemalloc is not the allocator (tests), its own empty arenas are purged.
    let refused =
        unsafe { tikv_jemalloc_sys::mallctl(c"arena.4096.purge".as_ptr(), null_mut(), null_mut(), null_mut(), 0) };
    if refused != 0 {
        tracing::debug!(code = refused, "the allocator does not give memory back");
    }
}
