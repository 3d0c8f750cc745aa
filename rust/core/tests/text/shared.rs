//! Where test data lies.

use std::path::{Path, PathBuf};

/// A file or directory of the data that is shared beside the repository, if it is there.
pub(crate) fn data(path: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    Some(root.join(path)).filter(|path| path.exists())
}

/// A file of `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).expect("a fixture is JSON")
}
