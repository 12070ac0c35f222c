//! PyTorch checkpoints are read as data. The weights are the saved ones. All other content is
//! refused with a reason, in bounded memory and without running code.
#![cfg(feature = "train")]

#[path = "support/checkpoint.rs"]
mod checkpoint;

use std::{fs, path::PathBuf};

use candle_core::{DType, Tensor};
use checkpoint::{Described, dict, number, of_pickle, pickle, text, zip};
use proptest::prelude::*;
use tadsr::{Error, Result, model::pth::Checkpoint};

/// Writes `bytes` to a new file and opens it.
fn open(bytes: &[u8]) -> (tempfile::TempDir, Result<Checkpoint>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("some.pth");
    fs::write(&path, bytes).unwrap();
    let opened = Checkpoint::open(&path);
    (dir, opened)
}

/// Returns the reason why a file is refused.
fn reason(bytes: &[u8]) -> String {
    let (_dir, opened) = open(bytes);
    let error = opened.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Model { .. }), "{text}");
    assert!(text.contains("some.pth"), "{text}");
    text
}

fn refused(object: &[u8]) -> String {
    reason(&of_pickle(&pickle(object)))
}

/// Returns a checkpoint with the tensor `t` over a storage of these bytes.
fn one(described: &Described, data: &[u8]) -> Vec<u8> {
    let object = pickle(&dict(&[("t", described.pickle())]));
    let place = format!("archive/data/{}", described.storage.1);
    zip(&[("archive/data.pkl", &object), (&place, data)])
}

fn read(bytes: &[u8]) -> Result<Tensor> {
    open(bytes).1?.read("t")
}

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn fixture(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures/mini");
    folder.join(name)
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_checkpoint_of_pytorch_is_read_by_name_and_shape() {
    let path = fixture("unet.pth");
    let mut unet = Checkpoint::open(&path).unwrap();
    assert_eq!(unet.shapes().count(), 266);
    let table = "middle_block.1.blocks.0.attn.relative_position_bias_table";
    assert!(unet.shapes().any(|(n, s)| n == table && s == [225, 2]));
    let names: Vec<String> = unet.shapes().map(|(n, _)| n.to_string()).collect();
    for name in names {
        let t = unet.read(&name).unwrap();
        if t.dtype() == DType::F32 {
            let sum = t
                .abs()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(sum.is_finite(), "{name}");
        } else {
            assert!(t.dtype() == DType::I64 && name.ends_with("relative_position_index"));
            let rows = t.to_vec2::<i64>().unwrap();
            assert_eq!((rows[0][0], rows[0][1], rows[63][0]), (112, 111, 224));
        }
    }
    assert!(
        unet.read("no.such")
            .unwrap_err()
            .to_string()
            .contains("'no.such'")
    );
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_damaged_weight_is_detected() {
    let path = fixture("unet.pth");
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    let mut unet = open(&bytes);
    let unet = unet.1.as_mut().unwrap();
    let names: Vec<String> = unet.shapes().map(|(n, _)| n.to_string()).collect();
    let failed: Vec<_> = names.iter().filter_map(|n| unet.read(n).err()).collect();
    assert_eq!(failed.len(), 1);
    assert!(failed[0].to_string().contains("checksum"), "{}", failed[0]);
}

#[test]
fn every_type_of_weights_is_read() {
    let described = |kind| Described {
        storage: (kind, "0", 2),
        offset: 0,
        shape: &[2],
        strides: &[1],
    };
    let (f64s, i64s) = ([1.5f64, -2.0], [3i64, -4]);
    let halves: Vec<u8> = [1.5, -2.0]
        .iter()
        .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
        .collect();
    let brain: Vec<u8> = [1.5, -2.0]
        .iter()
        .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
        .collect();
    for (kind, data, dtype) in [
        (
            "DoubleStorage",
            f64s.map(f64::to_le_bytes).concat(),
            DType::F64,
        ),
        ("HalfStorage", halves, DType::F16),
        ("BFloat16Storage", brain, DType::BF16),
    ] {
        let t = read(&one(&described(kind), &data)).unwrap();
        assert_eq!(t.dtype(), dtype);
        assert_eq!(
            t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(),
            [1.5, -2.0]
        );
    }
    let data = i64s.map(i64::to_le_bytes).concat();
    let t = read(&one(&described("LongStorage"), &data)).unwrap();
    assert_eq!(t.to_vec1::<i64>().unwrap(), i64s);
    let error = read(&one(&described("BoolStorage"), &[0, 1])).unwrap_err();
    assert!(error.to_string().contains("'t'"), "{error}");
}

#[test]
fn transposed_and_sliced_tensors_are_read_in_the_order_of_their_shape() {
    let view = |offset, shape, strides| Described {
        storage: ("FloatStorage", "0", 24),
        offset,
        shape,
        strides,
    };
    let values = |described: &Described| {
        let t = read(&one(described, &floats(24))).unwrap();
        (
            t.dims().to_vec(),
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        )
    };
    let (dims, transposed) = values(&view(0, &[4, 6], &[1, 4]));
    assert_eq!((dims, &transposed[..3]), (vec![4, 6], &[0.0, 4.0, 8.0][..]));
    let (_, part) = values(&view(7, &[2, 1, 3], &[6, 100, 1]));
    assert_eq!(part, [7.0, 8.0, 9.0, 13.0, 14.0, 15.0]);
    let (dims, scalar) = values(&view(23, &[], &[]));
    assert_eq!((dims, scalar), (vec![], vec![23.0]));
    let (dims, none) = values(&view(24, &[0, 3], &[3, 1]));
    assert_eq!((dims, none), (vec![0, 3], vec![]));
}

#[test]
fn tensors_may_share_a_storage_and_parameters_are_tensors() {
    let view = |offset| Described {
        storage: ("FloatStorage", "both", 4),
        offset,
        shape: &[2],
        strides: &[1],
    };
    let parameter = [
        b"ctorch._utils\n_rebuild_parameter\n(",
        &view(2).pickle()[..],
        b"\x88ccollections\nOrderedDict\n)RtR",
    ]
    .concat();
    let object = pickle(&dict(&[("t", parameter), ("u", view(1).pickle())]));
    let bytes = zip(&[
        ("archive/data.pkl", &object),
        ("archive/data/both", &floats(4)),
    ]);
    let (_dir, opened) = open(&bytes);
    let mut opened = opened.unwrap();
    let mut values = |name| opened.read(name).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values("t"), [2.0, 3.0]);
    assert_eq!(values("u"), [1.0, 2.0]);
}

#[test]
fn the_state_dict_is_found_and_the_rest_skipped() {
    let tensor = Described {
        storage: ("FloatStorage", "0", 1),
        offset: 0,
        shape: &[1],
        strides: &[1],
    };
    let weights = dict(&[("t", tensor.pickle())]);
    let optimiser = dict(&[
        ("lr", b"G\x3f\xb9\x99\x99\x99\x99\x99\x9a".to_vec()),
        ("betas", [number(0), number(1), b"\x86".to_vec()].concat()),
        ("groups", b"](K\x01K\x02eNa".to_vec()),
        ("t", tensor.pickle()),
        ("moment", tensor.pickle()),
    ]);
    for key in ["state_dict", "params_ema", "params", "ema"] {
        let object = pickle(&dict(&[
            ("optimizer", optimiser.clone()),
            (key, weights.clone()),
        ]));
        let bytes = zip(&[("a/data.pkl", &object), ("a/data/0", &floats(1))]);
        let (_dir, opened) = open(&bytes);
        let opened = opened.unwrap();
        assert_eq!(opened.shapes().collect::<Vec<_>>(), [("t", &[1][..])]);
    }
    let none = refused(&dict(&[("optimizer", optimiser), ("epoch", number(1))]));
    assert!(
        none.contains("state_dict") && none.contains("optimizer, epoch"),
        "{none}"
    );
}

#[test]
fn a_pickle_that_would_run_code_is_refused_by_the_name_of_the_function() {
    for (object, name) in [
        (&b"cos\nsystem\n(X\x04\0\0\0truetR"[..], "'os.system'"),
        (b"cbuiltins\neval\n)R", "'builtins.eval'"),
        (
            b"ctorch.serialization\nload\n.",
            "'torch.serialization.load'",
        ),
        (b"ctorch\nload\n.", "'torch.load'"),
        (
            b"ccollections\ndefaultdict\n)R",
            "'collections.defaultdict'",
        ),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n)R",
            "'numpy.core.multiarray._reconstruct'",
        ),
        (b"c\x1b[31m\nx\n", "'\\u{1b}[31m.x'"),
    ] {
        let text = refused(object);
        assert!(text.contains(name) && text.contains("refused"), "{text}");
    }
    // It is also refused in skipped parts.
    let hidden = dict(&[("optimizer", b"cos\nsystem\n".to_vec())]);
    assert!(refused(&hidden).contains("'os.system'"));
}

#[test]
fn instructions_that_weights_do_not_need_are_refused() {
    // INST, OBJ, NEWOBJ, STACK_GLOBAL, EXT1, PERSID, FRAME, POP, DUP, and one that does not exist.
    for code in *b"io\x81\x93\x82P\x9502\xff" {
        let text = refused(&[code, b'\n', b'\n', b'\n']);
        assert!(text.contains(&format!("0x{code:02x}")), "{text}");
    }
    assert!(reason(&of_pickle(b"\x80\x04.")).contains("protocol 4"));
    for wrong in [
        &b"R"[..],
        b"N)R",
        b")N\x86N",
        b"tu",
        b"(e",
        b"u",
        b"s",
        b"(",
        b"q\x01",
        b"h\x05",
        b"NNa",
        b"NNs",
        b"NNb",
        b"NQ",
        b"(X\x07\0\0\0storageK\x01tQ",
        b"ccollections\nOrderedDict\nN\x85R",
        b"ctorch\nFloatStorage\n)R",
        b"\x8a\x09123456789",
        b"X\xff\xff\xff\xff",
        b"X\x01\0\0\0\xff",
        b"cos",
        b"c\xff\n\n",
        b"G",
        b"",
        b"](N((e",
        b"N(\x85",
    ] {
        refused(wrong);
    }
}

#[test]
fn shapes_strides_and_offsets_must_lie_in_the_storage() {
    let huge = i64::MAX;
    for (stored, offset, shape, strides) in [
        (4, 0, &[5][..], &[1][..]),
        (4, 1, &[4], &[1]),
        (4, 5, &[0], &[1]),
        (4, -1, &[1], &[1]),
        (4, 0, &[-1], &[1]),
        (4, 0, &[2], &[-1]),
        (4, 0, &[2], &[4]),
        (4, 0, &[2, 2], &[2]),
        (4, 0, &[huge], &[0]),
        (4, 0, &[1 << 20], &[0]),
        (4, 0, &[huge, huge], &[1, 1]),
        (4, 0, &[0, huge, huge], &[1, 1, 1]),
        (4, 0, &[2, 2], &[huge, huge]),
        (4, huge, &[1], &[1]),
        (4, 0, &[1; 9], &[1; 9]),
        (5, 0, &[4], &[1]),
        (huge, 0, &[huge], &[1]),
        (-4, 0, &[4], &[1]),
    ] {
        let described = Described {
            storage: ("FloatStorage", "0", stored),
            offset,
            shape,
            strides,
        };
        reason(&one(&described, &floats(4)));
    }
}

#[test]
fn a_storage_that_is_missing_or_of_another_size_is_named_with_its_tensor() {
    let described = Described {
        storage: ("FloatStorage", "../../etc/passwd", 4),
        offset: 0,
        shape: &[4],
        strides: &[1],
    };
    let object = pickle(&dict(&[("t", described.pickle())]));
    let text = reason(&zip(&[
        ("archive/data.pkl", &object),
        ("archive/data/0", &floats(4)),
    ]));
    assert!(text.contains("'t' has no data"), "{text}");
    let text = reason(&one(&described, &floats(3)));
    assert!(text.contains("12 bytes, not 4 elements"), "{text}");
}

#[test]
fn many_names_for_one_storage_do_not_make_a_small_file_large() {
    let described = Described {
        storage: ("FloatStorage", "0", 1000),
        offset: 0,
        shape: &[1000],
        strides: &[1],
    };
    let names: Vec<String> = (0..100).map(|i| i.to_string()).collect();
    let items: Vec<_> = names
        .iter()
        .map(|n| (n.as_str(), described.pickle()))
        .collect();
    let object = pickle(&dict(&items));
    let text = reason(&zip(&[
        ("a/data.pkl", &object),
        ("a/data/0", &floats(1000)),
    ]));
    assert!(text.contains("many times"), "{text}");
    let twice = dict(&[("t", described.pickle()), ("t", described.pickle())]);
    assert!(
        reason(&zip(&[
            ("a/data.pkl", &pickle(&twice)),
            ("a/data/0", &floats(1000))
        ]))
        .contains("twice")
    );
}

#[test]
fn nesting_cycles_and_repetition_take_neither_stack_nor_memory() {
    // A dict in itself, nested tuples, doubling tuples, a pickle of marks, nested lists.
    refused(b"}q\x00X\x01\0\0\0ah\x00s");
    refused(&[b"N".to_vec(), vec![0x85; 400_000]].concat());
    let doubling: Vec<u8> = (0..60u8)
        .flat_map(|i| [b'h', i, b'h', i, 0x86, b'q', i + 1])
        .collect();
    refused(&[b"Nq\x00", &doubling[..]].concat());
    refused(&vec![b'('; 400_000]);
    refused(&[b"](".to_vec(), vec![b']'; 400_000], b"e".to_vec()].concat());
    let long = refused(&vec![b'N'; 3_000_000]);
    assert!(long.contains("instructions"), "{long}");
    let large = refused(&text(&"x".repeat(5 << 20)));
    assert!(large.contains("bytes, more than"), "{large}");
}

#[test]
fn other_files_are_named_with_the_remedy() {
    assert!(
        reason(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.and more of it").contains("old format")
    );
    assert!(
        reason(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.and more of it")
            .contains("torch.save(torch.load(")
    );
    assert!(reason(b"\x40\0\0\0\0\0\0\0{\"__metadata__\": {}}").contains("safetensors"));
    assert!(reason(b"hello, this is a text file").contains("no zip archive"));
    assert!(reason(b"").contains("too short"));
    assert!(reason(&zip(&[("word/document.xml", b"text")])).contains("no data.pkl"));
    assert!(
        reason(&zip(&[("m/data.pkl", b"."), ("m/constants.pkl", b".")])).contains("TorchScript")
    );
    assert!(reason(&zip(&[("m/data.pkl", b"."), ("n/data.pkl", b".")])).contains("more than one"));
    assert!(reason(&zip(&[("m/data.pkl", b"."), ("m/byteorder", b"big")])).contains("big-endian"));
    let dir = tempfile::tempdir().unwrap();
    let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(text.contains("not a regular file"), "{text}");
    let error = Checkpoint::open(&dir.path().join("none.pth")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("none.pth"), "{text}");
}

#[test]
fn archives_that_overlap_compress_or_lie_about_sizes_are_refused() {
    let described = Described {
        storage: ("FloatStorage", "0", 4),
        offset: 0,
        shape: &[4],
        strides: &[1],
    };
    let good = one(&described, &floats(4));
    assert!(read(&good).is_ok());
    let end = good.len() - 22;
    let directory = u32::from_le_bytes(good[end + 16..end + 20].try_into().unwrap()) as usize;
    // Offsets in the first entry of the directory: method, compressed and full size, local header.
    let change = |at: usize, value: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        reason(&bytes)
    };
    let second = directory + 46 + "archive/data.pkl".len();
    assert!(change(directory + 10, 8).contains("compressed"));
    assert!(change(directory + 24, u32::MAX).contains("compressed"));
    assert!(change(directory + 42, u32::MAX).contains("not in the file"));
    assert!(change(second + 42, 0).contains("overlap"));
    assert!(change(end + 16, u32::MAX).contains("damaged"));
    assert!(change(end + 16, 1).contains("damaged"));
    assert!(change(end + 10, 0xffff).contains("damaged"));
    assert!(change(end + 10, 1).contains("damaged"));
    let twice = zip(&[("a/data.pkl", b"."), ("a/data.pkl", b".")]);
    assert!(reason(&twice).contains("twice"));
    // The size of the directory is not used.
    let mut bytes = good.clone();
    bytes[end + 12..end + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        read(&bytes).unwrap().to_vec1::<f32>().unwrap(),
        [0.0, 1.0, 2.0, 3.0]
    );
}

#[test]
fn a_directory_of_many_megabytes_is_refused() {
    let names: Vec<String> = (0..100)
        .map(|i| format!("{i}{}", "x".repeat(60_000)))
        .collect();
    let entries: Vec<_> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    let text = reason(&zip(&entries));
    assert!(text.contains("directory is too large"), "{text}");
}

/// Reads all tensors in the file and ignores the results.
fn exhaust(bytes: &[u8]) {
    let (_dir, opened) = open(bytes);
    if let Ok(mut opened) = opened {
        let names: Vec<String> = opened.shapes().map(|(n, _)| n.to_string()).collect();
        for name in names {
            let _ = opened.read(&name);
        }
    }
}

/// Returns a small checkpoint with several types, strides, a nested dict and an attribute.
fn sample() -> Vec<u8> {
    let view = |kind, key, shape, strides| Described {
        storage: (kind, key, 6),
        offset: 0,
        shape,
        strides,
    };
    let state = dict(&[
        ("a", view("FloatStorage", "0", &[2, 3], &[3, 1]).pickle()),
        ("b", view("FloatStorage", "0", &[3, 2], &[1, 3]).pickle()),
        ("c", view("HalfStorage", "1", &[6], &[1]).pickle()),
    ]);
    let state = [&state[..], &dict(&[("_metadata", number(1))]), b"b"].concat();
    let object = pickle(&dict(&[("epoch", number(3)), ("state_dict", state)]));
    zip(&[
        ("archive/data.pkl", &object),
        ("archive/byteorder", b"little"),
        ("archive/data/0", &floats(6)),
        ("archive/data/1", &floats(3)),
    ])
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = sample();
    assert!(open(&bytes).1.is_ok());
    for n in 0..bytes.len() {
        reason(&bytes[..n]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_damaged_bytes_panic(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = sample();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        exhaust(&bytes);
    }

    #[test]
    fn no_pickle_panics(object in prop::collection::vec(any::<u8>(), 0..200)) {
        exhaust(&of_pickle(&object));
    }

    /// Programs of supported instructions run further than random bytes.
    #[test]
    fn no_program_panics(codes in prop::collection::vec(prop::sample::select(vec![
        &b"("[..], b")", b"}", b"]", b"N", b"\x85", b"\x86", b"\x87", b"t", b"u", b"s", b"a", b"e", b"b", b"R", b"Q",
        b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"K\x01", b"K\x02", b"J\xff\xff\xff\xff", b"X\x07\0\0\0storage",
        b"X\x01\0\0\0k", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    ]), 0..60)) {
        exhaust(&of_pickle(&pickle(&codes.concat())));
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_published_file_damaged_anywhere_in_its_headers_is_survived() {
    let path = fixture("autoencoder.pth");
    let bytes = fs::read(path).unwrap();
    // The pickle is at the start, the directory at the end.
    let places = (0..24_000)
        .step_by(97)
        .chain((bytes.len() - 20_000..bytes.len()).step_by(97));
    for at in places {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        let (_dir, opened) = open(&bytes);
        drop(opened);
    }
    for n in (0..bytes.len()).step_by(bytes.len() / 40) {
        reason(&bytes[..n]);
    }
}
