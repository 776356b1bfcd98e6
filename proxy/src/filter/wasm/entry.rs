//! The way into a guest.
//!
//! [`TypedFunc::call`](wasmtime::TypedFunc::call) is compiled anew for each type and, as a rule, into each place that calls: with eight callbacks
//! per request, the processor spends more time on fetching that than on running it. Here all of them share one.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use wasmtime::{AsContextMut, Func, Store, StoreContextMut, ValRaw, WasmParams, WasmResults};

use super::host::Host;

/// Parameters: one or more words of 32 bits.
///
/// # Safety
/// The words are those of the type as `wasmtime` knows it, in order.
pub(super) unsafe trait Params: WasmParams {
    type Words: AsMut<[ValRaw]>;
    fn words(self) -> Self::Words;
}

/// A result: a word of 32 bits, or nothing.
///
/// # Safety
/// Nothing longer.
pub(super) unsafe trait Answer: WasmResults {
    fn of(words: &[ValRaw]) -> Self;
}

/// A guest's function, of a type that was checked once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Callback<P, R = ()> {
    function: Func,
    ty: PhantomData<fn(P) -> R>,
}

impl<P: Params, R: Answer> Callback<P, R> {
    /// A function as a callback of this type.
    ///
    /// # Errors
    /// When the function is of another type.
    pub(super) fn new(store: &Store<Host>, function: Func) -> wasmtime::Result<Self> {
        function.typed::<P, R>(store)?;
        Ok(Self { function, ty: PhantomData })
    }

    /// Calls it. An error is a trap, or what a host function ended the guest with.
    pub(super) fn call(&self, mut store: impl AsContextMut<Data = Host>, params: P) -> wasmtime::Result<R> {
        let mut words = params.words();
        // SAFETY: this function was found to have just these parameters and this result in `new`.
        unsafe { enter(store.as_context_mut(), self.function, words.as_mut())? };
        Ok(R::of(words.as_mut()))
    }
}

/// # Safety
/// The words are the function's parameters, and it returns no more than one. None of them is a reference.
#[inline(never)]
unsafe fn enter(store: StoreContextMut<'_, Host>, function: Func, words: &mut [ValRaw]) -> wasmtime::Result<()> {
    // SAFETY: the caller's; there is room for the result, and wasmtime itself sees that the function is of this store.
    unsafe { function.call_unchecked(store, words) }
}

macro_rules! params {
    ($($type:ty, $count:literal, $params:pat => $($word:ident),*;)*) => {$(
        // SAFETY: a word for each of the type's.
        unsafe impl Params for $type {
            type Words = [ValRaw; $count];

            fn words(self) -> Self::Words {
                let $params = self;
                [$(ValRaw::u32($word)),*]
            }
        }
    )*};
}

params! {
    u32, 1, a => a;
    (u32, u32), 2, (a, b) => a, b;
    (u32, u32, u32), 3, (a, b, c) => a, b, c;
    (u32, u32, u32, u32, u32), 5, (a, b, c, d, e) => a, b, c, d, e;
}

// SAFETY: nothing.
unsafe impl Answer for () {
    fn of(_: &[ValRaw]) -> Self {}
}

// SAFETY: one word.
unsafe impl Answer for u32 {
    fn of(words: &[ValRaw]) -> Self {
        words.first().map_or(0, ValRaw::get_u32)
    }
}
