//! How much memory there is for a frame.

use std::{fs, path::Path};

use candle_core::{Device, DeviceLocation};

use crate::cuda::driver;

/// What is assumed where the system does not tell: on anything but Linux.
const UNKNOWN: u64 = 4 << 30;

/// Bytes that may still be taken for the `planes` bytes of a frame, which this process keeps, and for tensors on `device`.
pub(super) fn available_on(device: &Device, planes: u64) -> u64 {
    let DeviceLocation::Cuda { gpu_id } = device.location() else {
        return available();
    };
    let free = || -> crate::Result<usize> { Ok(driver::open(gpu_id)?.free_memory()?) };
    match available() {
        host if host < planes => host,
        _ => planes + free().map_or(UNKNOWN, |bytes| bytes as u64),
    }
}

/// Bytes that this process may still take: what the kernel takes for available, or what the tightest control group above
/// the process has left, whichever is less.
fn available() -> u64 {
    available_below(Path::new("/")).unwrap_or(UNKNOWN)
}

fn available_below(root: &Path) -> Option<u64> {
    let system = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| field(&text, "MemAvailable:"))
        .and_then(|kib: u64| kib.checked_mul(1024));
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let left = groups.lines().filter_map(|line| left_in_group(root, line));
    system.into_iter().chain(left).min()
}

/// What is left in the control group that a line of `/proc/self/cgroup` names, and in those around it: `0::/path` of
/// version 2, `7:memory:/path` of version 1. Inside a container the path may be the host's; the groups that are
/// visible are asked.
fn left_in_group(root: &Path, line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':');
    let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let (mount, limit, usage, cache) = if id == "0" {
        (
            "sys/fs/cgroup",
            "memory.max",
            "memory.current",
            "inactive_file",
        )
    } else if controllers.split(',').any(|c| c == "memory") {
        let (limit, usage) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
        ("sys/fs/cgroup/memory", limit, usage, "total_inactive_file")
    } else {
        return None;
    };
    let left = |group: &Path| -> Option<u64> {
        let group = root.join(mount).join(group);
        let number = |name| -> Option<u64> {
            let text = fs::read_to_string(group.join(name)).ok()?;
            // "max" is no limit.
            text.trim().parse().ok()
        };
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        // Pages of files that nobody uses are given up when memory is short.
        let used = number(usage)?.saturating_sub(field(&stat, cache).unwrap_or(0));
        Some(number(limit)?.saturating_sub(used))
    };
    let path = Path::new(path.trim_start_matches('/'));
    path.ancestors().filter_map(left).min()
}

/// The number after `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some(name))?;
    line.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with the given files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:  16000 kB\nMemFree:  100 kB\nMemAvailable:   8000 kB\n",
    );

    #[test]
    fn without_control_groups_the_kernels_number_holds() {
        let root = system(&[MEMINFO]);
        assert_eq!(available_below(root.path()), Some(8000 * 1024));
        assert_eq!(available_below(system(&[]).path()), None);
    }

    #[test]
    fn the_tightest_group_of_version_2_holds_and_its_page_cache_counts_as_free() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/memory.max", "5000000\n"),
            ("sys/fs/cgroup/outer/memory.current", "4000000\n"),
            (
                "sys/fs/cgroup/outer/memory.stat",
                "anon 7\ninactive_file 500000\n",
            ),
            ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/outer/inner/memory.current", "3000000\n"),
        ]);
        assert_eq!(available_below(root.path()), Some(1_500_000));
    }

    #[test]
    fn in_a_container_of_version_1_the_visible_group_is_asked() {
        let root = system(&[
            MEMINFO,
            (
                "proc/self/cgroup",
                "7:cpu,memory:/docker/0123\n3:cpuset:/\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n"),
        ]);
        assert_eq!(available_below(root.path()), Some(500_000));
    }

    #[test]
    fn a_limit_beyond_the_machine_does_not_hold() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "99000000000\n"),
            ("sys/fs/cgroup/memory.current", "1\n"),
        ]);
        assert_eq!(available_below(root.path()), Some(8000 * 1024));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_tells() {
        assert!(available_below(Path::new("/")).is_some_and(|bytes| bytes > 0));
    }
}
