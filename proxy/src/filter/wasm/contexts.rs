//! The live contexts of an instance, by their ids.

use super::host::Context;

/// Places of a table that has any.
const LEAST: usize = 16;

/// Ids count up, and each has one place of the table: what is left of it when divided by the places. As a rule a few contexts live that
/// began one after the other, and no two of them meet; an id whose place is taken is passed over. At most half of the places are taken.
#[derive(Debug, Default)]
pub(super) struct Contexts {
    places: Vec<Option<(u32, Context)>>,
    live: usize,
    last: u32,
}

impl Contexts {
    fn place(&self, id: u32) -> usize {
        // The length is a power of two.
        usize::try_from(id).unwrap_or_default() & self.places.len().wrapping_sub(1)
    }

    /// Adds one. Its id is unique among those that live, and never 0; ids wrap after four billion contexts.
    pub(super) fn add(&mut self, context: Context) -> u32 {
        if self.live * 2 >= self.places.len() {
            self.grow();
        }
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            let (id, at) = (self.last, self.place(self.last));
            if let Some(place @ None) = self.places.get_mut(at) {
                *place = Some((id, context));
                self.live += 1;
                return id;
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let more = (self.places.len() * 2).max(LEAST);
        let old = std::mem::take(&mut self.places);
        self.places.resize_with(more, || None);
        // Those that did not meet in fewer places do not in more.
        for (id, context) in old.into_iter().flatten() {
            let at = self.place(id);
            if let Some(place) = self.places.get_mut(at) {
                *place = Some((id, context));
            }
        }
    }

    /// The context of an id.
    pub(super) fn get(&self, id: u32) -> Option<&Context> {
        let (of, context) = self.places.get(self.place(id))?.as_ref()?;
        (*of == id).then_some(context)
    }

    /// Takes one away.
    pub(super) fn remove(&mut self, id: u32) {
        let at = self.place(id);
        if let Some(place) = self.places.get_mut(at).filter(|place| place.as_ref().is_some_and(|(of, _)| *of == id)) {
            *place = None;
            self.live -= 1;
        }
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Context> {
        self.places.iter().flatten().map(|(_, context)| context)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn context(root: usize) -> Context {
        Context { root, stream: None }
    }

    #[test]
    fn ids_count_up_from_one() {
        let mut contexts = Contexts::default();
        assert_eq!(contexts.get(0).map(|context| context.root), None);
        contexts.remove(1);
        assert_eq!((1..=40).map(|_| contexts.add(context(0))).collect::<Vec<_>>(), (1..=40).collect::<Vec<_>>());
    }

    #[test]
    fn an_id_that_lives_is_not_given_again() {
        let mut contexts = Contexts::default();
        let long = contexts.add(context(7));
        let (mut last, mut given) = (long, 0);
        for _ in 0..100 {
            let id = contexts.add(context(0));
            contexts.remove(id);
            assert!(id > last);
            (last, given) = (id, given + 1);
        }
        // One in sixteen was passed over.
        assert!(last > given + 1 && last < given + 10, "{last}");
        contexts.last = u32::MAX;
        assert_eq!(contexts.add(context(0)), 2);
        assert_eq!(contexts.get(long).map(|context| context.root), Some(7));
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 0..300)) {
            let (mut contexts, mut map) = (Contexts::default(), HashMap::new());
            for (number, (adds, which)) in steps.into_iter().enumerate() {
                let ids: Vec<u32> = map.keys().copied().collect();
                if adds || ids.is_empty() {
                    prop_assert_eq!(map.insert(contexts.add(context(number)), number), None);
                } else {
                    let id = *which.get(&ids);
                    contexts.remove(id);
                    map.remove(&id);
                    prop_assert!(contexts.get(id).is_none());
                }
                prop_assert!(map.iter().all(|(id, root)| contexts.get(*id).is_some_and(|context| context.root == *root)));
                prop_assert_eq!(contexts.iter().count(), map.len());
            }
        }
    }
}
