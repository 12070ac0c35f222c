//! Bytes of PyTorch checkpoints: the archive, its pickle, and all weights.
#![no_main]

use std::{fs, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tadsr::model::pth::Checkpoint;
use tempfile::NamedTempFile;

static FILE: LazyLock<NamedTempFile> = LazyLock::new(|| NamedTempFile::new().unwrap());

fuzz_target!(|data: &[u8]| {
    fs::write(FILE.path(), data).unwrap();
    let Ok(mut checkpoint) = Checkpoint::open(FILE.path()) else {
        return;
    };
    let shapes = checkpoint
        .shapes()
        .map(|(n, s)| (n.to_string(), s.to_vec()));
    for (name, shape) in shapes.collect::<Vec<_>>() {
        if let Ok(tensor) = checkpoint.read(&name) {
            assert_eq!(tensor.dims(), shape);
        }
    }
});
