//! Bytes of PyTorch checkpoints: the archive, its pickle, all weights, and the import of what they
//! may be. Bytes that are no archive become the pickle of one without checksums, because a checksum
//! would refuse nearly every change of a pickle.
#![no_main]

use std::{fs, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tadsr::model::{import::Part, pth::Checkpoint};
use tempfile::NamedTempFile;

#[allow(dead_code)]
#[path = "../../tests/support/checkpoint.rs"]
mod support;

static FILE: LazyLock<NamedTempFile> = LazyLock::new(|| NamedTempFile::new().unwrap());

fuzz_target!(|data: &[u8]| {
    let storage = [7; 64];
    let wrapped = || support::zip(&[("archive/data.pkl", data), ("archive/data/0", &storage)]);
    if data.starts_with(b"PK") {
        fs::write(FILE.path(), data).unwrap();
    } else {
        fs::write(FILE.path(), wrapped()).unwrap();
    }
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
    if let Ok(part) = Part::open(FILE.path()) {
        let _ = part.unet_config(None);
        let _ = part.autoencoder_config();
    }
});
