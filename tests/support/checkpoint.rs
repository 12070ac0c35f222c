//! Writes valid and hostile PyTorch checkpoints.

/// Returns a zip archive of stored entries without checksums, as PyTorch can write it.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    let short = |n: usize| (n as u16).to_le_bytes();
    let long = |n: usize| (n as u32).to_le_bytes();
    for (name, data) in entries {
        let offset = file.len();
        // Version, flags, method, time, date, checksum; then the lengths.
        let common = [
            &[0; 14][..],
            &long(data.len()),
            &long(data.len()),
            &short(name.len()),
            &[0; 2],
        ]
        .concat();
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), data].concat());
        directory.extend([b"PK\x01\x02\0\0", &common[..], &[0; 10], &long(offset)].concat());
        directory.extend(name.as_bytes());
    }
    let count = short(entries.len());
    let end = [
        &count[..],
        &count,
        &long(directory.len()),
        &long(file.len()),
    ]
    .concat();
    [&file, &directory, &b"PK\x05\x06\0\0\0\0"[..], &end, &[0; 2]].concat()
}

/// Returns a checkpoint of this pickle without storages.
pub fn of_pickle(pickle: &[u8]) -> Vec<u8> {
    zip(&[("archive/data.pkl", pickle)])
}

/// Returns the instructions that push a text.
pub fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

/// Returns the instructions that push a number.
pub fn number(n: i64) -> Vec<u8> {
    [b"\x8a\x08", &n.to_le_bytes()[..]].concat()
}

fn numbers(values: &[i64]) -> Vec<u8> {
    let values: Vec<u8> = values.iter().flat_map(|&n| number(n)).collect();
    [b"(", &values[..], b"t"].concat()
}

/// Description of a tensor in a pickle.
pub struct Described<'a> {
    pub storage: (&'a str, &'a str, i64),
    pub offset: i64,
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

impl Described<'_> {
    /// Returns the instructions that push it.
    pub fn pickle(&self) -> Vec<u8> {
        let (kind, key, stored) = self.storage;
        let storage = [
            &b"("[..],
            &text("storage"),
            format!("ctorch\n{kind}\n").as_bytes(),
            &text(key),
            &text("cpu"),
            &number(stored),
            b"tQ",
        ]
        .concat();
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            &storage[..],
            &number(self.offset),
            &numbers(self.shape),
            &numbers(self.strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
        .concat()
    }
}

/// Returns the instructions that push a dict.
pub fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items
        .iter()
        .flat_map(|(name, value)| [text(name), value.clone()].concat())
        .collect();
    [b"}(", &items[..], b"u"].concat()
}

/// Returns a complete pickle of this object.
pub fn pickle(object: &[u8]) -> Vec<u8> {
    [b"\x80\x02", object, b"."].concat()
}

/// Returns a checkpoint of f32 tensors, under `key` if there is one.
#[allow(dead_code)]
pub fn checkpoint(key: Option<&str>, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let keys: Vec<String> = (0..tensors.len()).map(|i| i.to_string()).collect();
    let describe =
        |((name, shape, values), key): (&'_ (String, Vec<usize>, Vec<f32>), &'_ String)| {
            let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
            let mut strides = vec![1; shape.len()];
            for i in (1..shape.len()).rev() {
                strides[i - 1] = strides[i] * shape[i];
            }
            let described = Described {
                storage: ("FloatStorage", key, values.len() as i64),
                offset: 0,
                shape: &shape,
                strides: &strides,
            };
            (name.clone(), described.pickle())
        };
    let described: Vec<_> = tensors.iter().zip(&keys).map(describe).collect();
    let items: Vec<_> = described
        .iter()
        .map(|(n, p)| (n.as_str(), p.clone()))
        .collect();
    let mut object = dict(&items);
    if let Some(key) = key {
        object = dict(&[("step", number(7)), (key, object)]);
    }
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(.., values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let names: Vec<String> = keys.iter().map(|k| format!("archive/data/{k}")).collect();
    let object = pickle(&object);
    let mut entries = vec![("archive/data.pkl", &object[..])];
    entries.extend(names.iter().zip(&data).map(|(n, d)| (n.as_str(), &d[..])));
    zip(&entries)
}
