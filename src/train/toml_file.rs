//! Tables of TOML files, with errors that name the file and the key.

use std::{fs, path::Path};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use toml::{Table, Value};

use crate::{Error, Result};

/// Reads the file at `path`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Setting`] that names file and line of a mistake.
pub(super) fn read_table(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    text.parse().map_err(|e| wrong(path, e))
}

/// Reads the file at `path` as a `T`.
///
/// # Errors
/// As [`read_table`].
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    toml::from_str(&text).map_err(|e| wrong(path, e))
}

/// Takes the value `key` out of `table`, which is that of the file at `path`.
///
/// # Errors
/// [`Error::Setting`] that names the file and the key.
pub(super) fn take<T: DeserializeOwned>(
    table: &mut Table,
    key: &str,
    path: &Path,
) -> Result<Option<T>> {
    let value = table.remove(key).map(T::deserialize).transpose();
    value.map_err(|e| wrong(path, format!("{key}: {}", e.to_string().trim())))
}

/// Takes the section `key` out of `table`: a table, or the name of a file beside the one at `path`.
///
/// # Errors
/// As [`read`] and [`take`].
pub(super) fn take_section<T: DeserializeOwned>(
    table: &mut Table,
    key: &str,
    path: &Path,
) -> Result<Option<T>> {
    if let Some(Value::String(name)) = table.get(key) {
        let section = read(&path.with_file_name(name))?;
        table.remove(key);
        return Ok(Some(section));
    }
    take(table, key, path)
}

/// An error about the file at `path`.
pub(super) fn wrong(path: &Path, reason: impl ToString) -> Error {
    let reason = reason.to_string();
    Error::Setting(format!("'{}': {}", path.display(), reason.trim()))
}

/// Deserializes a list, or one value as a list of it.
pub(super) fn one_or_many<'de, T, D>(deserializer: D) -> std::result::Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(value) => vec![value],
        OneOrMany::Many(values) => values,
    })
}
