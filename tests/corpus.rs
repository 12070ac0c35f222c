//! Training data: mixed folders, degradation by codecs, the pool of compressed clips.
#![cfg(all(feature = "train", feature = "video"))]

use std::{fs, path::Path, process::Command, sync::Mutex, time::Duration};

use assert_cmd::cargo::CommandCargoExt;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tadsr::{
    Error,
    frame::{Frame, FrameInfo, PixelFormat},
    train::{
        data::{
            Patch, Preparation, Sampling,
            corpus::Corpus,
            pairs::{Pair, PairSource, Random},
            pool::{Layout, Make, Pool},
            spec::{CorpusSpec, PoolSpec},
            synthetic::Synthetic,
        },
        degradation::{Degradation, codec::Kind},
    },
    video::{Options, StreamInfo, TimedFrame, Writer},
};

/// Returns a static clip of noise with soft colours.
fn still(rng: &mut StdRng, side: usize, frames: usize) -> Vec<Patch> {
    let mut patch = Patch::new(side, side);
    let coarse: Vec<f32> = (0..3 * 100 * 100).map(|_| rng.random()).collect();
    for (i, v) in patch.rgb.iter_mut().enumerate() {
        let (x, y, c) = (i % side / 4, i / side % side / 4, i / (side * side));
        *v = 0.2 + 0.6 * coarse[(c * 100 + y % 100) * 100 + x % 100];
    }
    vec![patch; frames]
}

fn spec(clips: usize) -> PoolSpec {
    PoolSpec {
        clips,
        frames: 4,
        retained: 2,
        ..PoolSpec::default()
    }
}

/// Returns a single recipe: a fixed kernel, then H.264 of good quality.
fn gentle() -> Degradation {
    Degradation::from_toml(
        r#"
[[recipe]]
name = "gentle"
weight = 1
[[recipe.stage]]
kind = "shrink"
catmull_rom = 1
area = 0
lanczos3 = 0
[[recipe.stage]]
kind = "codec"
h265 = 0
vp9 = 0
av1 = 0
crf = [4, 8]
rate_controlled = 0
effort = [0, 0]
"#,
    )
    .unwrap()
}

fn require_h264() {
    let there = Kind::H264.try_out();
    assert!(there.is_ok(), "{there:?}: it needs {}", Kind::H264.needs());
}

fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Returns the mean absolute difference of the shrunk ground truth and the degraded image, shifted
/// by (dx, dy).
fn misfit(truth: &Patch, low: &Patch, (dx, dy): (isize, isize)) -> f32 {
    let n = low.width;
    let small = truth
        .clone()
        .resize(n, n, tadsr::frame::resample::Kernel::CatmullRom)
        .unwrap();
    let (mut sum, mut count) = (0.0, 0.0f32);
    for y in 2..n - 2 {
        for x in 2..n - 2 {
            let at = y * n + x;
            let moved = y.saturating_add_signed(dy) * n + x.saturating_add_signed(dx);
            sum += (small.rgb[n * n + at] - low.rgb[n * n + moved]).abs();
            count += 1.0;
        }
    }
    sum / count
}

/// Makes a folder with photos, a video, broken files and other files.
fn mixed(dir: &Path) -> CorpusSpec {
    let data = dir.join("data");
    fs::create_dir_all(data.join("deep")).unwrap();
    for n in 0..3 {
        let patch = still(&mut seeded(n), 200, 1).swap_remove(0);
        let picture = image::RgbImage::from_raw(200, 200, patch.to_rgb8()).unwrap();
        picture.save(data.join(format!("deep/{n}.png"))).unwrap();
    }
    let frames: Vec<_> = (0..20u64)
        .map(|t| still(&mut seeded(t / 10), 160, 1).swap_remove(0))
        .collect();
    let info = FrameInfo::new(PixelFormat::I420, 160, 160);
    let stream = StreamInfo::new(info, Some((25, 1))).unwrap();
    let options = Options {
        encoder: "x264enc pass=quant quantizer=10 speed-preset=ultrafast".into(),
        ..Options::default()
    };
    let mut writer = Writer::create(&data.join("a.mp4"), &stream, &options, None).unwrap();
    for (t, patch) in (0u32..).zip(frames) {
        let frame = Frame::from_rgb8_as(info, &patch.to_rgb8()).unwrap();
        let (pts, duration) = (Duration::from_millis(40) * t, None);
        writer
            .push(&TimedFrame {
                frame,
                pts,
                duration,
            })
            .unwrap();
    }
    writer.finish(false).unwrap();
    fs::write(data.join("b.mp4"), "no video").unwrap();
    fs::write(data.join("c.jpg"), "no photo").unwrap();
    fs::write(data.join("notes.txt"), "nothing").unwrap();
    CorpusSpec {
        dirs: vec![data],
        cache: Some(dir.join("cache")),
        hold_out: 3,
        pool: spec(8),
        video_share: 0.5,
        recipes: gentle().recipes,
        ..CorpusSpec::default()
    }
}

fn load(spec: &CorpusSpec) -> tadsr::Result<Corpus> {
    Corpus::load(spec, 48, [1.25, 2.0], &|_| true)
}

#[test]
fn photos_and_videos_of_a_mixed_folder_become_pairs_that_the_seed_decides() {
    require_h264();
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed(dir.path());
    let clean = Degradation::clean().recipes;
    spec.recipes.extend(clean);
    let seen = Mutex::new(Vec::new());
    let corpus = Corpus::load(&spec, 48, [1.25, 2.0], &|progress| {
        seen.lock().unwrap().push(progress);
        true
    });
    let corpus = corpus.unwrap();
    let mut skipped: Vec<_> = corpus
        .skipped()
        .iter()
        .map(|s| s.path.file_name())
        .collect();
    skipped.sort();
    assert_eq!(skipped, [Some("b.mp4".as_ref()), Some("c.jpg".as_ref())]);
    assert_eq!(corpus.photos().map(|p| p.len()), Some(2));
    assert!(corpus.clips().is_some() && corpus.held_out().len() == 1);
    let last = seen.into_inner().unwrap().pop();
    assert_eq!(last, Some(Preparation::Pool { done: 8, all: 8 }));
    let again = load(&spec).unwrap();
    assert_eq!(corpus.fingerprint(), again.fingerprint());
    for seed in 0..12 {
        for small in [24, 33] {
            let draw = |corpus: &Corpus| {
                let mut random = Random::new(seed, 100 + seed);
                corpus.pair(&mut random, 48, small).unwrap()
            };
            let pair = draw(&corpus);
            assert_eq!((pair.truth.width, pair.low.width), (48, small));
            assert_eq!(pair, draw(&again));
            let there = misfit(&pair.truth, &pair.low, (0, 0));
            assert!(there < misfit(&pair.truth, &pair.low, (1, 0)));
        }
    }
    for (_, source) in corpus.held_out_kinds() {
        let pair = source.pair(&mut Random::new(1, 2), 48, 24).unwrap();
        let misfit = |at| misfit(&pair.truth, &pair.low, at);
        assert!(misfit((0, 0)) < misfit((1, 0)));
    }
    assert_eq!(corpus.held_out_kinds().len(), 3);
    let other = CorpusSpec {
        video_share: 0.4,
        ..spec.clone()
    };
    assert!(load(&other).unwrap().fingerprint() != corpus.fingerprint());
    let sampling = Sampling {
        shrink: 0.0,
        ..Sampling::default()
    };
    let other = CorpusSpec {
        sampling: sampling.clone(),
        ..spec.clone()
    };
    let other = load(&other).unwrap();
    assert_eq!(other.photos().map(|p| &p.sampling), Some(&sampling));
    assert_eq!(other.held_out().sampling, sampling);
    // The pool's photos are sampled, too.
    let pool = |corpus: &Corpus| corpus.pool().map(Pool::key);
    assert!(pool(&other) != pool(&corpus));
    // A video alone is sufficient: measurements use one of its frames.
    let alone = CorpusSpec {
        dirs: vec![dir.path().join("data/a.mp4")],
        hold_out: 20,
        ..spec.clone()
    };
    let alone = load(&alone).unwrap();
    assert_eq!(alone.held_out().len(), 1);
    assert!(alone.notes()[0].contains("too few"), "{:?}", alone.notes());
    assert!(corpus.notes().is_empty(), "{:?}", corpus.notes());
    // Photos alone: one of the few is held out.
    let photos = CorpusSpec {
        dirs: vec![dir.path().join("data/deep")],
        hold_out: 4,
        ..spec.clone()
    };
    let photos = load(&photos).unwrap();
    assert_eq!(photos.photos().map(|p| p.len()), Some(3));
    assert!(
        photos.notes()[0].contains("3 photos"),
        "{:?}",
        photos.notes()
    );
    // Synthetic pictures are added to the photos. None is held out.
    let synthetic = Synthetic {
        dead_leaves: 3,
        ..Synthetic::default()
    };
    let rendered = CorpusSpec { synthetic, ..spec };
    let rendered = load(&rendered).unwrap();
    assert_eq!(rendered.photos().map(|p| p.len()), Some(2 + 3));
    assert_eq!(rendered.held_out().len(), corpus.held_out().len());
}

#[test]
fn unfit_data_is_an_error_that_names_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let spec = mixed(dir.path());
    let fault = |spec: CorpusSpec| load(&spec).err().unwrap().to_string();
    let none = dir.path().join("none");
    fs::create_dir(&none).unwrap();
    let empty = CorpusSpec {
        dirs: vec![none],
        ..spec.clone()
    };
    assert!(fault(empty).contains("no usable"));
    let missing = CorpusSpec {
        dirs: vec![dir.path().join("missing")],
        ..spec.clone()
    };
    assert!(fault(missing).contains("missing"));
    let unknown = CorpusSpec {
        preset: "cinema".into(),
        recipes: Vec::new(),
        ..spec.clone()
    };
    let text = fault(unknown);
    assert!(
        text.contains("cinema") && text.contains("streaming"),
        "{text}"
    );
    require_h264();
    let photos = CorpusSpec {
        dirs: vec![dir.path().join("data/deep")],
        ..spec.clone()
    };
    let large = Corpus::load(&photos, 128, [1.25, 2.0], &|_| true);
    let text = large.err().unwrap().to_string();
    assert!(text.contains("288") && text.contains("stills"), "{text}");
    let stopped = Corpus::load(&spec, 48, [1.25, 2.0], &|_| false);
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

#[test]
fn compressed_clips_cover_exactly_their_ground_truth_at_every_scale() {
    require_h264();
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(64, [1.25, 4.0]);
    let pool = Pool::open(dir.path(), &spec(12), layout, gentle(), 1).unwrap();
    let side = pool.layout().side;
    let make = |rng: &mut StdRng| Ok(still(rng, side, 4));
    for (seed, small) in [51, 40, 32, 31, 24, 22, 20, 16].into_iter().enumerate() {
        for seed in 0..3 + seed as u64 % 2 {
            let sampling = Sampling::default();
            let mut random = Random::new(seed, 100 + seed);
            let pairs = pool.pairs(&make, &sampling, &mut random, (64, small), 1);
            let Pair { truth, low, .. } = pairs.unwrap().remove(0);
            assert_eq!((truth.width, truth.height), (64, 64));
            assert_eq!((low.width, low.height), (small, small));
            let there = misfit(&truth, &low, (0, 0));
            for beside in [(1, 0), (-1, 0), (0, 1), (0, -1)] {
                let beside = misfit(&truth, &low, beside);
                assert!(there < 0.6 * beside, "{small}: {there} {beside}");
            }
        }
    }
}

#[test]
fn frames_of_a_clip_are_cut_and_turned_alike() {
    require_h264();
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(64, [1.25, 2.0]);
    let all = PoolSpec {
        retained: 4,
        ..spec(8)
    };
    let pool = Pool::open(dir.path(), &all, layout, gentle(), 1).unwrap();
    let side = pool.layout().side;
    let make = |rng: &mut StdRng| Ok(still(rng, side, 4));
    let clip = |frames| {
        let mut random = Random::new(5, 6);
        pool.pairs(&make, &Sampling::default(), &mut random, (64, 32), frames)
    };
    let pairs = clip(3).unwrap();
    assert_eq!(pairs.len(), 3);
    for pair in &pairs {
        assert_eq!(pair.truth, pairs[0].truth, "the scene stands still");
        assert!(pair.low.luma_difference(&pairs[0].low) < 9.0);
    }
    assert!(matches!(clip(5), Err(Error::Data(_))));
}

#[test]
fn a_pool_is_reproducible_and_used_again() {
    require_h264();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let open = |dir: &Path, source| {
        let layout = Layout::new(48, [1.25, 2.0]);
        Pool::open(dir, &spec(8), layout, gentle(), source).unwrap()
    };
    let [mut a, mut b] = [0, 1].map(|i| open(dirs[i].path(), 1));
    let side = a.layout().side;
    let make = |rng: &mut StdRng| Ok(still(rng, side, 4));
    a.prepare(&make, &|_, _| true).unwrap();
    b.prepare(&make, &|_, _| true).unwrap();
    for clip in 0..8 {
        fs::remove_file(b.folder().join(format!("{clip:06}.rgb"))).unwrap();
    }
    let pair = |pool: &Pool, make: &Make, seed| {
        let sampling = Sampling::default();
        pool.pairs(
            make,
            &sampling,
            &mut Random::new(seed, 100 + seed),
            (48, 24),
            1,
        )
    };
    for seed in 0..6 {
        let want = pair(&a, &make, seed).unwrap();
        assert_eq!(want, pair(&b, &make, seed).unwrap());
    }
    // Only broken clips are made again.
    let never = |_: &mut StdRng| Err(Error::Frame("made again".into()));
    let mut a = open(dirs[0].path(), 1);
    a.prepare(&never, &|_, _| true).unwrap();
    let want = pair(&a, &make, 3).unwrap();
    for file in fs::read_dir(a.folder()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "rgb") {
            fs::write(path, "broken").unwrap();
        }
    }
    assert!(
        pair(&a, &never, 3)
            .unwrap_err()
            .to_string()
            .contains("made again")
    );
    assert_eq!(pair(&a, &make, 3).unwrap(), want);
    // Other pictures make another pool.
    let other = open(dirs[0].path(), 2);
    assert!(other.key() != a.key() && other.folder() != a.folder());
}

#[test]
fn a_pool_stays_within_its_limit_and_stops_on_request() {
    require_h264();
    let dir = tempfile::tempdir().unwrap();
    let small = PoolSpec {
        limit: 4,
        ..spec(1000)
    };
    let layout = Layout::new(48, [1.25, 2.0]);
    let open = |spec: &PoolSpec| Pool::open(dir.path(), spec, layout.clone(), gentle(), 1);
    let mut pool = open(&small).unwrap();
    assert!(pool.len() < 1000 && pool.size() <= 4 << 20 && pool.size() > 3 << 20);
    let side = pool.layout().side;
    let make = |rng: &mut StdRng| Ok(still(rng, side, 4));
    let stopped = pool.prepare(&make, &|done, all| {
        assert!(done <= all);
        false
    });
    assert!(matches!(stopped, Err(Error::Cancelled)));
    pool.prepare(&make, &|_, _| true).unwrap();
    let files = fs::read_dir(pool.folder()).unwrap();
    let bytes: u64 = files.map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes < pool.size() + 4096, "{bytes}");
    let tiny = PoolSpec {
        limit: 1,
        retained: 4,
        ..spec(1000)
    };
    let large = Pool::open(
        dir.path(),
        &tiny,
        Layout::new(192, [1.25, 4.0]),
        gentle(),
        1,
    );
    assert!(large.err().unwrap().to_string().contains("limit"));
}

fn tool(args: &[&str]) -> (bool, String) {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    let output = command.args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn data_check_lists_used_files_and_reasons_to_skip_others() {
    let dir = tempfile::tempdir().unwrap();
    mixed(dir.path());
    let data = dir.path().join("data");
    let data = data.to_str().unwrap();
    let check = ["data", "check", data, "--patch", "48"];
    let (good, text) = tool(&check);
    assert!(good, "{text}");
    for word in [
        "photos: 3",
        "c.jpg",
        "b.mp4",
        "1 with .txt",
        "H.264",
        "clean",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    require_h264();
    for word in [
        "160x160, 25.00 fps, 0.8 s, H.264",
        "compressed clips of 144x144",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    // Larger scales have another grid.
    for (scale, side) in [("2", 96), ("4", 192)] {
        let (_, text) = tool(&["data", "check", data, "--scale", scale]);
        let sides = format!("photos: 3 with sides of at least {side} pixels");
        assert!(text.contains(&sides), "{sides}: {text}");
    }
    let own = dir.path().join("degradation.toml");
    let own = own.to_str().unwrap();
    let (_, preset) = tool(&["data", "preset", "real-world"]);
    fs::write(own, &preset).unwrap();
    let (good, text) = tool(&[&check[..], &["--degradation", own]].concat());
    assert!(good && text.contains("100 % real-world"), "{text}");
    fs::write(own, preset.replace("gaussian", "gausian")).unwrap();
    let (good, text) = tool(&[&check[..], &["--degradation", own]].concat());
    assert!(
        !good && text.contains("degradation.toml") && text.contains("gausian"),
        "{text}"
    );
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let (good, text) = tool(&[
        "data",
        "check",
        empty.to_str().unwrap(),
        "--preset",
        "clean",
    ]);
    assert!(!good && text.contains("nothing"), "{text}");
}
