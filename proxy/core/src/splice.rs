//! How the bytes of one direction of an opaque stream are moved: through a buffer, or through a pipe with splice(2).
//!
//! A pipe spares two copies, but costs a system call more for each piece: it pays for bulk, and for nothing else. Whether a stream
//! is bulk is seen from what its reads bring.

/// Reads in a row that filled the buffer, after which a direction is spliced.
pub const FULL_READS: u8 = 4;
/// Less than this at once, bytes, is not worth a pipe.
pub const SMALL: usize = 16 * 1024;
/// Small pieces in a row after which a direction goes back to the buffer.
pub const SMALL_READS: u8 = 8;

/// One direction's way of being moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Switch {
    splices: bool,
    /// Reads in a row that speak for the other way
    against: u8,
}

impl Switch {
    /// Whether the next bytes go through a pipe.
    pub fn splices(&self) -> bool {
        self.splices
    }

    /// The buffer of `room` bytes was read into once, and so many came.
    pub fn buffered(&mut self, bytes: usize, room: usize) {
        self.count(bytes >= room, FULL_READS, true);
    }

    /// So many bytes went into the empty pipe at once.
    pub fn spliced(&mut self, bytes: usize) {
        self.count(bytes < SMALL, SMALL_READS, false);
    }

    fn count(&mut self, against: bool, enough: u8, splices: bool) {
        self.against = if against { self.against + 1 } else { 0 };
        if self.against >= enough {
            *self = Self { splices, against: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOM: usize = 64 * 1024;

    fn step(switch: &mut Switch, bytes: usize) {
        if switch.splices() {
            switch.spliced(bytes);
        } else {
            switch.buffered(bytes, ROOM);
        }
    }

    #[test]
    fn bulk_is_spliced_and_small_talk_is_not() {
        let mut switch = Switch::default();
        for _ in 0..FULL_READS {
            assert!(!switch.splices());
            step(&mut switch, ROOM);
        }
        assert!(switch.splices());
        for _ in 0..SMALL_READS {
            assert!(switch.splices());
            step(&mut switch, 100);
        }
        assert!(!switch.splices());
    }

    fn sizes() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(prop_oneof![1..SMALL, SMALL..ROOM, Just(ROOM)], 1..200)
    }

    proptest! {
        /// The way changes exactly after so many reads in a row against it, whatever came before.
        #[test]
        fn only_a_run_of_reads_changes_the_way(sizes in sizes()) {
            let mut switch = Switch::default();
            let mut since: Vec<usize> = Vec::new();
            for bytes in sizes {
                let before = switch.splices();
                step(&mut switch, bytes);
                since.push(bytes);
                let run = |wanted: usize, against: &dyn Fn(usize) -> bool| {
                    since.len() >= wanted && since.iter().rev().take(wanted).all(|bytes| against(*bytes))
                };
                let changes = if before {
                    run(SMALL_READS.into(), &|bytes| bytes < SMALL)
                } else {
                    run(FULL_READS.into(), &|bytes| bytes >= ROOM)
                };
                prop_assert_eq!(switch.splices() != before, changes);
                if changes {
                    since.clear();
                }
            }
        }

        /// However a stream behaves, its way changes at most once in so many reads: it does not flap.
        #[test]
        fn changes_are_rare(sizes in sizes()) {
            let mut switch = Switch::default();
            let mut changes = 0;
            for bytes in &sizes {
                let before = switch.splices();
                step(&mut switch, *bytes);
                changes += usize::from(switch.splices() != before);
            }
            prop_assert!(changes <= sizes.len() / usize::from(FULL_READS));
        }
    }
}
