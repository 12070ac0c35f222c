//! The user's cache folder.

use std::{
    env,
    path::{Path, PathBuf},
};

/// Returns `tadsr` in the user's cache folder.
pub fn cache_folder() -> PathBuf {
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.filter(|p| p.is_absolute()).or_else(home);
    base.unwrap_or_else(env::temp_dir).join("tadsr")
}
