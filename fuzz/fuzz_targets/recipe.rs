//! Text of recipes and degradation recipes, the values of settings, and models with settings.
#![no_main]

use std::{fs, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use tadsr::{
    Device,
    engine::{Precision, Temporal},
    train::{
        Recipe,
        degradation::Degradation,
        eval::{Condition, Method},
    },
};
use tempfile::NamedTempFile;

static FILE: LazyLock<NamedTempFile> = LazyLock::new(|| NamedTempFile::new().unwrap());

fuzz_target!(|text: &str| {
    let _ = text.parse::<Device>();
    let _ = text.parse::<Precision>();
    let _ = text.parse::<Temporal>();
    let _ = text.parse::<Condition>();
    let _ = Method::model(&format!("tiny@{text}"), Device::Cpu);
    if let Ok(degradation) = Degradation::from_toml(text) {
        let again = Degradation::from_toml(&degradation.to_toml()).unwrap();
        assert_eq!(again, degradation);
    }
    fs::write(FILE.path(), text).unwrap();
    let _ = Recipe::read(FILE.path());
});
