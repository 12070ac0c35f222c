//! The source of the kernels on the CPU: `host/host.cpp`, compiled by the local C++ compiler.

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

/// Returns the number of calls of [`launch`].
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

/// Runs a kernel thread by thread, in alternating calls in reverse order.
///
/// # Safety
/// `params` are the words of the kernel's parameter structure, and the kernel may access the memory
/// that they point to.
///
/// # Panics
/// If there is no such kernel or no C++ compiler.
pub unsafe fn launch(name: &str, grid: [u32; 3], block: [u32; 3], params: &[u64]) {
    static LAUNCH: OnceLock<Launch> = OnceLock::new();
    let launch = *LAUNCH.get_or_init(load);
    let text = CString::new(name).unwrap();
    // SAFETY: the caller ensures it.
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
    // SAFETY: the library is built from host/, and its function has this type.
    unsafe {
        let launch = libc::dlsym(library, c"tadsr_launch".as_ptr());
        assert!(!launch.is_null(), "no tadsr_launch");
        std::mem::transmute::<*mut libc::c_void, Launch>(launch)
    }
}

/// Loads the stand-in `host/driver.cpp` as the NVIDIA driver of this process. Returns its function
/// that counts the allocated bytes.
pub fn load_driver() -> unsafe extern "C" fn() -> usize {
    let library = open("driver.cpp");
    // SAFETY: the library is built from host/, and its function has this type.
    unsafe {
        let allocated = libc::dlsym(library, c"tadsr_allocated".as_ptr());
        assert!(!allocated.is_null(), "no tadsr_allocated");
        std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn() -> usize>(allocated)
    }
}

/// Loads the library of a source in `host/`.
fn open(source: &str) -> *mut libc::c_void {
    let path = CString::new(compiled(source).as_os_str().as_bytes()).unwrap();
    // SAFETY: the library is built from host/ and does nothing when it is loaded.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if library.is_null() {
            panic!("{:?}", CStr::from_ptr(libc::dlerror()));
        }
        library
    }
}

/// Compiles a source once and returns the library, which lies beside the test's executable.
fn compiled(source: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut hasher = DefaultHasher::new();
    for folder in [
        "ops/cuda/host",
        "ops/cuda/kernels",
        "engine/lite/cuda/kernels",
        "../benches/gpu",
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
            // The name under which the driver's library is loaded.
            .args(match source {
                "driver.cpp" => &["-Wl,-soname,libcuda.so.1"][..],
                _ => &[],
            })
            .arg("-o")
            .args([&made, &root.join("ops/cuda/host").join(source)])
            .output()
            .expect("these tests require a C++ compiler: c++ or the one in CXX");
        assert!(
            said.status.success(),
            "{}",
            String::from_utf8_lossy(&said.stderr)
        );
        fs::rename(made, &to).unwrap();
    }
    to
}
