//! Memory that is available for a frame.

use std::{fs, path::Path};

use candle_core::{Device, DeviceLocation};

use crate::cuda::driver;

/// Bytes that are assumed to be available if the system does not report a number.
const UNKNOWN: u64 = 4 << 30;

/// Returns the bytes that are available for tensors on `device` and for the planes of a frame, of
/// `planes` bytes on the host.
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

/// Returns the bytes that this process may still allocate: the minimum of the available memory of
/// the system and the remaining memory of its control groups.
fn available() -> u64 {
    available_below(Path::new("/")).unwrap_or(UNKNOWN)
}

fn available_below(root: &Path) -> Option<u64> {
    let system = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| field(&text, "MemAvailable:"))
        .and_then(|kib: u64| kib.checked_mul(1024));
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let remaining = groups
        .lines()
        .filter_map(|line| remaining_in_group(root, line));
    system.into_iter().chain(remaining).min()
}

/// Returns the minimum of the remaining memory of a control group and its ancestors. `line` of
/// `/proc/self/cgroup` names the group: `0::/path` in version 2, `7:memory:/path` in version 1. In
/// a container the path may be that of the host, so groups that do not exist are skipped.
fn remaining_in_group(root: &Path, line: &str) -> Option<u64> {
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
    let remaining = |group: &Path| -> Option<u64> {
        let group = root.join(mount).join(group);
        let number = |name| -> Option<u64> {
            let text = fs::read_to_string(group.join(name)).ok()?;
            // "max", which is not a number, means no limit.
            text.trim().parse().ok()
        };
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        // The kernel frees inactive pages of files if memory is short.
        let used = number(usage)?.saturating_sub(field(&stat, cache).unwrap_or(0));
        Some(number(limit)?.saturating_sub(used))
    };
    let path = Path::new(path.trim_start_matches('/'));
    path.ancestors().filter_map(remaining).min()
}

/// Returns the number after `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some(name))?;
    line.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a root folder with the given files.
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
    fn without_control_groups_the_memory_of_the_system_counts() {
        let root = system(&[MEMINFO]);
        assert_eq!(available_below(root.path()), Some(8000 * 1024));
        assert_eq!(available_below(system(&[]).path()), None);
    }

    #[test]
    fn the_smallest_group_of_version_2_counts_and_its_page_cache_is_available() {
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
    fn in_a_container_of_version_1_the_visible_group_counts() {
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
    fn a_limit_above_the_memory_of_the_system_has_no_effect() {
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
    fn this_machine_reports_its_memory() {
        assert!(available_below(Path::new("/")).is_some_and(|bytes| bytes > 0));
    }
}
