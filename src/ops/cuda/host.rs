//! The kernels' own source on the CPU: `host/host.cpp` compiled by the machine's C++ compiler.

use std::{
    collections::hash_map::DefaultHasher,
    ffi::{CStr, CString, c_char},
    fs,
    hash::{Hash, Hasher},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

static LAUNCHES: AtomicUsize = AtomicUsize::new(0);

/// How often [`launch`] was called.
pub fn launches() -> usize {
    LAUNCHES.load(Ordering::Relaxed)
}

type Launch = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    params: *const u64,
    backwards: bool,
) -> bool;

/// Runs a kernel thread by thread, every other time the last ones first.
///
/// # Safety
/// `params` are the words of the structure that the kernel takes, and what they point to may be read and written as the
/// kernel does.
///
/// # Panics
/// When there is no such kernel, or no C++ compiler.
pub unsafe fn launch(name: &str, grid: [u32; 3], block: [u32; 3], params: &[u64]) {
    static LAUNCH: OnceLock<Launch> = OnceLock::new();
    let launch = *LAUNCH.get_or_init(load);
    let text = CString::new(name).unwrap();
    // SAFETY: the caller's promise.
    let found = unsafe {
        launch(
            text.as_ptr(),
            grid.as_ptr(),
            block.as_ptr(),
            params.as_ptr(),
            LAUNCHES.fetch_add(1, Ordering::Relaxed) & 1 > 0,
        )
    };
    assert!(found, "host.cpp has no kernel {name}");
}

fn load() -> Launch {
    let library = open("host.cpp");
    // SAFETY: a library of ours, whose function has that type.
    unsafe {
        let launch = libc::dlsym(library, c"tadsr_launch".as_ptr());
        assert!(!launch.is_null(), "no tadsr_launch");
        std::mem::transmute::<*mut libc::c_void, Launch>(launch)
    }
}

/// Makes the stand-in of `host/driver.cpp` this process's NVIDIA driver. Gives the function that tells how many bytes of its device
/// are allocated.
pub fn load_driver() -> unsafe extern "C" fn() -> usize {
    let library = open("driver.cpp");
    // SAFETY: a library of ours, whose function has that type.
    unsafe {
        let allocated = libc::dlsym(library, c"tadsr_allocated".as_ptr());
        assert!(!allocated.is_null(), "no tadsr_allocated");
        std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn() -> usize>(allocated)
    }
}

/// The library that a source of `host/` makes.
fn open(source: &str) -> *mut libc::c_void {
    let path = CString::new(compiled(source).as_os_str().as_bytes()).unwrap();
    // SAFETY: a library of ours, which does nothing when it is loaded.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if library.is_null() {
            panic!("{:?}", CStr::from_ptr(libc::dlerror()));
        }
        library
    }
}

/// It lies beside the test's executable; compiled once for the same sources.
fn compiled(source: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut hasher = DefaultHasher::new();
    for folder in [
        "ops/cuda/host",
        "ops/cuda/kernels",
        "engine/lite/cuda/kernels",
    ] {
        let entries = fs::read_dir(root.join(folder)).expect("the kernels' sources");
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for file in files {
            fs::read(file).unwrap().hash(&mut hasher);
        }
    }
    let name = format!("{source}-{:016x}.so", hasher.finish());
    let to = std::env::current_exe().unwrap().with_file_name(name);
    if !to.exists() {
        let made = to.with_extension(std::process::id().to_string());
        let compiler = std::env::var("CXX").unwrap_or("c++".into());
        let mut compiler = compiler.split_whitespace();
        let said = Command::new(compiler.next().unwrap_or("c++"))
            .args(compiler)
            .args(["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"])
            .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
            // The name by which the driver's library is looked for.
            .args(match source {
                "driver.cpp" => &["-Wl,-soname,libcuda.so.1"][..],
                _ => &[],
            })
            .arg("-o")
            .args([&made, &root.join("ops/cuda/host").join(source)])
            .output()
            .expect("these tests need a C++ compiler: c++, or what CXX names");
        assert!(
            said.status.success(),
            "{}",
            String::from_utf8_lossy(&said.stderr)
        );
        fs::rename(made, &to).unwrap();
    }
    to
}
