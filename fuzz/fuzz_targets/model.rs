//! Bytes of model files. The metadata of a file that is accepted must survive writing and reading,
//! and its network must upscale.
#![no_main]

use std::{fs, path::Path, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tadsr::{
    Device, Upscaler,
    frame::{Frame, FrameInfo, PixelFormat},
    model::{LiteModel, ResShiftModel},
};
use tempfile::NamedTempFile;

static FILE: LazyLock<NamedTempFile> = LazyLock::new(|| NamedTempFile::new().unwrap());

/// Parameters of a network that is upscaled with.
const MAX_PARAMETERS: usize = 20_000;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzz");
    let _ = ResShiftModel::parse(data, path);
    let Ok(model) = LiteModel::parse(data, path) else {
        return;
    };
    let again = LiteModel::parse(&model.to_bytes(false).unwrap(), path).unwrap();
    assert_eq!(again.metadata, model.metadata);
    let scales = model.metadata.scales;
    if model.metadata.student.parameters() > MAX_PARAMETERS {
        return;
    }
    fs::write(FILE.path(), data).unwrap();
    let mut upscaler = Upscaler::load(FILE.path().to_str().unwrap(), Device::Cpu).unwrap();
    if upscaler.set_scale(scales[1]).is_ok() {
        let frame = Frame::new(FrameInfo::new(PixelFormat::I420, 18, 10)).unwrap();
        upscaler.upscale(&frame).unwrap();
    }
});
