//! Photos for tests of training.

use std::path::{Path, PathBuf};

/// Makes a folder `photos` in `dir` with three textured images of `width` x `height` pixels.
pub fn photos(dir: &Path, (width, height): (u32, u32)) -> PathBuf {
    let folder = dir.join("photos");
    std::fs::create_dir(&folder).unwrap();
    for n in 0..3u32 {
        let picture = image::RgbImage::from_fn(width, height, |x, y| {
            let edge = ((x / 7 + y / 5 + n) % 2) * 90;
            let wave = 60.0 * ((x * y) as f32 * 0.01 + n as f32).sin();
            image::Rgb([edge as u8 + 40, (100.0 + wave) as u8, (edge / 2 + x) as u8])
        });
        picture.save(folder.join(format!("{n}.png"))).unwrap();
    }
    folder
}
