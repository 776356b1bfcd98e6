use super::*;

const GOOD: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: demo}\nspec:\n  selector: {app: reviews}\n  ports: [{port: 80}]\n";
const BAD: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: demo}\nspec:\n  selector: {app: reviews}\n  ports: [{port: 99999999}]\n";
const OTHER: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: ratings, namespace: demo}\nspec:\n  selector: {app: ratings}\n  ports: [{port: 80}]\n";
const POLICY: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: demo}\nspec:\n  selector: {matchLabels: {app: reviews}}\n  action: Allow\n  rules: []\n";
const BAD_POLICY: &str = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: demo}\nspec:\n  selector: {matchLabels: {app: reviews}}\n  action: Alow\n  rules: []\n";

fn open(directory: &tempfile::TempDir) -> Store {
    Store::open(directory.path().join("last-good.json")).unwrap()
}

type Files = BTreeMap<String, Result<String, String>>;

fn files(texts: &[(&str, &str)]) -> Files {
    texts.iter().map(|(file, text)| ((*file).to_owned(), Ok((*text).to_owned()))).collect()
}

/// What is in force, and what is said, after the files are exactly these.
struct State {
    resources: Vec<Arc<Loaded>>,
    accepted: Arc<Accepted>,
}

impl std::ops::Deref for State {
    type Target = Accepted;

    fn deref(&self) -> &Accepted {
        &self.accepted
    }
}

impl Store {
    fn all(&mut self, files: &Files) -> State {
        let gone = self.files.keys().filter(|file| !files.contains_key(*file)).map(|file| (file.clone(), None));
        let mut changes: Changes = gone.collect();
        changes.extend(files.iter().map(|(file, text)| (file.clone(), Some(text.clone()))));
        match self.files.is_empty() {
            true => self.begin(changes),
            false => self.apply(changes),
        };
        State { resources: self.resources(), accepted: self.accepted() }
    }
}

fn names(state: &State) -> Vec<&str> {
    state.resources.iter().map(|loaded| loaded.id.name.as_str()).collect()
}

fn serving(accepted: &Accepted) -> Vec<Serving> {
    accepted.rejected.iter().map(|rejected| rejected.serving).collect()
}

#[test]
fn a_bad_version_is_rejected_alone_and_the_last_good_one_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory);
    assert!(store.all(&files(&[("a.yaml", GOOD), ("b.yaml", OTHER)])).rejected.is_empty());
    store.save().unwrap();
    for mut store in [store, open(&directory)] {
        let accepted = store.all(&files(&[("a.yaml", BAD), ("b.yaml", OTHER)]));
        assert_eq!(names(&accepted), ["reviews", "ratings"]);
        assert_eq!(accepted.resources[0].document.trim(), GOOD.trim());
        assert_eq!(serving(&accepted), [Serving::LastGood]);
        let rejection = &accepted.rejected[0].rejection;
        assert_eq!((rejection.file.as_str(), rejection.name.as_str()), ("a.yaml", "reviews"));
        assert!(rejection.field.starts_with("spec.ports[0]"), "{rejection}");
        // The document is removed: so is the resource.
        assert_eq!(names(&store.all(&files(&[("b.yaml", OTHER)]))), ["ratings"]);
    }
}

#[test]
fn without_an_earlier_version_nothing_serves() {
    let directory = tempfile::tempdir().unwrap();
    let accepted = open(&directory).all(&files(&[("a.yaml", BAD)]));
    assert!(accepted.resources.is_empty());
    assert_eq!(serving(&accepted), [Serving::Nothing]);
}

#[test]
fn an_unreadable_file_keeps_what_it_held() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory);
    store.all(&files(&[("a.yaml", &format!("{GOOD}---\n{OTHER}"))]));
    let accepted = store.all(&files(&[("a.yaml", "kind: [Service\n")]));
    assert_eq!(names(&accepted), ["reviews", "ratings"]);
    assert_eq!(serving(&accepted), [Serving::LastGood]);
    let mut unreadable = Files::new();
    unreadable.insert("a.yaml".into(), Err("permission denied".into()));
    assert_eq!(names(&store.all(&unreadable)), ["reviews", "ratings"]);
}

#[test]
fn a_policy_without_a_good_version_fails_closed() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory);
    let accepted = store.all(&files(&[("p.yaml", BAD_POLICY)]));
    assert_eq!(serving(&accepted), [Serving::Closed]);
    let [closed] = accepted.closed.as_slice() else { panic!("{:?}", accepted.closed) };
    assert_eq!((closed.closes.what, closed.closes.namespace.as_str()), (Closed::Authorization, "demo"));
    assert_eq!(closed.closes.selector.as_ref().unwrap()["app"], "reviews");
    // With one, that one goes on.
    store.all(&files(&[("p.yaml", POLICY)]));
    let accepted = store.all(&files(&[("p.yaml", BAD_POLICY)]));
    assert_eq!((serving(&accepted), accepted.closed.len()), (vec![Serving::LastGood], 0));
}

#[test]
fn the_first_of_two_declarations_counts_and_a_move_between_files_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory);
    let accepted = store.all(&files(&[("a.yaml", GOOD), ("b.yaml", GOOD)]));
    assert_eq!(names(&accepted), ["reviews"]);
    assert!(accepted.rejected[0].rejection.reason.contains("a.yaml:1"), "{}", accepted.rejected[0].rejection);
    let accepted = store.all(&files(&[("b.yaml", GOOD)]));
    assert_eq!((names(&accepted), accepted.rejected.len()), (vec!["reviews"], 0));
}

#[test]
fn the_order_of_creation_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(&directory);
    store.all(&files(&[("z.yaml", GOOD)]));
    store.all(&files(&[("a.yaml", OTHER), ("z.yaml", GOOD)]));
    store.save().unwrap();
    let accepted = open(&directory).all(&files(&[("a.yaml", OTHER), ("z.yaml", GOOD)]));
    assert_eq!(names(&accepted), ["reviews", "ratings"]);
}
