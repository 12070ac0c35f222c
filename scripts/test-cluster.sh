#!/usr/bin/env bash
# Tests the recipes in examples/cluster with GNU parallel over ssh, Slurm and Ray on this machine.
# The jobs for Kubernetes are validated, and the commands of their pods run without a cluster.
#
# Usage: scripts/test-cluster.sh [--no-install] [RECIPE..]
#
# The recipes are parallel, slurm, ray and kubernetes, by default all of them.
#
# TADSR_TRAIN selects the program tadsr-train. Otherwise the script builds it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$root/tests/cluster/slurm.sh"
venv=$target/cluster-venv
if [[ ${1-} == --no-install ]]; then
    shift
else
    install_packages "${gstreamer_packages[@]}" "${test_packages[@]}" "${cluster_packages[@]}"
    [[ -x $venv/bin/pip ]] || /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${cluster_modules[@]}" ||
        fail "pip could not install ${cluster_modules[*]}"
fi
[[ $# -gt 0 ]] || set -- parallel slurm ray kubernetes
if [[ -z ${TADSR_TRAIN-} ]]; then
    require_rust
    (cd "$root" && cargo build --release --locked --bin tadsr-train) || fail "tadsr-train does not build"
    TADSR_TRAIN=$target/release/tadsr-train
fi
program=$(realpath "$TADSR_TRAIN")
[[ -x $program ]] || fail "there is no program '$TADSR_TRAIN'"

# Sockets have short paths.
work=$(mktemp -d /tmp/tadsr-cluster.XXX)
recipes=$root/examples/cluster
bin=$work/bin
settings=(--model tiny --segment-length 2 --encoder 'x264enc pass=quant quantizer=10 speed-preset=ultrafast')
# Tasks share the cores of this machine.
one=(--threads 1)
daemons=()

stop() {
    local status=$?
    [[ ${#daemons[@]} -eq 0 ]] || kill "${daemons[@]}" 2>/dev/null || true
    wait
    if [[ $status -eq 0 ]]; then
        rm -rf "$work"
    else
        say "The files of the test are in '$work'" >&2
    fi
}
trap stop EXIT

# until_true SECONDS COMMAND..: waits until the command succeeds.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [[ $SECONDS -lt $end ]] || return 1
        sleep 0.1
    done
}

# free_ports COUNT: prints ports that no process uses.
free_ports() {
    "$venv/bin/python" - "$1" <<'TEXT'
import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*[s.getsockname()[1] for s in sockets])
TEXT
}

# Prints times and checksums of the decoded frames and of the packets of sound.
content() {
    ffmpeg -v error -i "$1" -map 0:v -fps_mode passthrough -f framemd5 -
    ffmpeg -v error -i "$1" -map 0:a -c copy -f framemd5 -
}

# says FILE TEXT..: fails unless the output in FILE contains all texts.
says() {
    local file=$1 text
    shift
    for text in "$@"; do
        grep -qF -- "$text" "$file" || fail "$recipe: '$text' is missing in this output:
$(tail -n 40 "$file")"
    done
}

# refused TEXT COMMAND..: fails unless the command fails with a message that contains TEXT.
refused() {
    local text=$1
    shift
    if "$@" >refused.txt 2>&1; then
        fail "$recipe: this should fail: $*"
    fi
    says refused.txt "$text"
}

prepare() {
    mkdir -p "$bin/kill"
    cp "$root/tests/cluster/tadsr-train" "$bin"
    ln -s "$program" "$bin/program"
    export PATH=$bin:$PATH
    local video=testsrc2=s=320x180:r=25:d=8 tone=sine=r=48000:d=8
    ffmpeg -v error -f lavfi -i "$video" -f lavfi -i "$tone" -c:v libx264 -g 50 -keyint_min 50 \
        -sc_threshold 0 -c:a aac "$work/a film.mkv"
    # 7.2 s, and sound that begins later than the video.
    ffmpeg -v error -i "$work/a film.mkv" -itsoffset 0.3 -i "$work/a film.mkv" -map 0:v -map 1:a -t 7.2 \
        -c copy "$work/it's.mp4"
    say "Upscaling both films without interruption"
    local film
    for film in 'a film.mkv' "it's.mp4"; do
        "$program" upscale "$work/$film" "$work/whole $film" "${settings[@]}" "${one[@]}"
        content "$work/whole $film" >"$work/whole $film.txt"
        [[ $(wc -l <"$work/whole $film.txt") -gt 400 ]] || fail "there are too few frames in 'whole $film'"
    done
}

# test_recipe LEVEL COMMAND..: runs a recipe whose last argument is a list of films, twice. In the
# first run, tasks of the first film are killed once, and a task of the second film always.
# LEVEL tells which process of a task is killed besides the program.
test_recipe() {
    local level=$1 film
    shift
    printf '%s\t%s\n' '../a film.mkv' 'large film.mkv' "../it's.mp4" "it's large.mp4" >films.tsv
    rm -f "$bin"/kill/* "$bin"/{killed,missed}
    echo once 0 >"$bin/kill/large film.mkv.2"
    echo once "$level" >"$bin/kill/large film.mkv.3"
    echo always 0 >"$bin/kill/it's large.mp4.3"

    if "$@" >first.txt 2>&1; then
        fail "$recipe: a failed segment does not give a status"
    fi
    says "$bin/killed" 'large film.mkv.2 ' 'large film.mkv.3 ' "it's large.mp4.3 "
    [[ ! -e $bin/missed ]] || fail "$recipe: not killed midway: $(cat "$bin/missed")"
    [[ -e 'large film.mkv' ]] || fail "$recipe: the first film is missing:
$(tail -n 40 first.txt)"
    [[ ! -e "it's large.mp4" ]] || fail "$recipe: a film without all segments was joined"
    [[ -e "it's large.mp4.segments/00004.segment" ]] || fail "$recipe: a failure stops other segments"

    rm "$bin"/kill/*
    "$@" >second.txt 2>&1 || fail "$recipe: it does not go on:
$(tail -n 40 second.txt)"
    for film in "a film.mkv:large film.mkv" "it's.mp4:it's large.mp4"; do
        content "${film#*:}" | cmp - "$work/whole ${film%:*}.txt" ||
            fail "$recipe: '${film#*:}' differs from the film of an uninterrupted run"
        [[ ! -e ${film#*:}.segments ]] || fail "$recipe: the segments of '${film#*:}' are left"
    done
}

# Wrong input, which tasks.sh and step.sh refuse for all recipes.
test_steps() {
    local step=("$recipes/step.sh" "../a film.mkv" out.mkv)
    printf '../a film.mkv\tout.mkv\n' >films.tsv
    refused "there is no list of films" "$recipes/tasks.sh" none.tsv "${settings[@]}"
    refused "name the model" "$recipes/tasks.sh" films.tsv
    refused "there is no tadsr-train: install it" env PATH=/usr/bin:/bin "$recipes/tasks.sh" films.tsv "${settings[@]}"
    [[ $("$recipes/tasks.sh" films.tsv "${settings[@]}" | cut -f 3 | paste -sd ' ') == '1 2 3 4' ]] ||
        fail "tasks.sh does not list 4 segments"
    printf '../b.mkv\tb.mkv\n' >wrong.tsv
    refused "correct 'wrong.tsv' or mount the shared folder" "$recipes/tasks.sh" wrong.tsv "${settings[@]}"
    printf 'a.mkv b.mkv\n' >wrong.tsv
    refused "'a.mkv b.mkv' has no output" "$recipes/tasks.sh" wrong.tsv "${settings[@]}"
    refused "there is no tadsr-train: install it" env PATH=/usr/bin:/bin "${step[@]}" 1 "${settings[@]}"
    refused "segments 1 to 4" "${step[@]}" 5 "${settings[@]}"
    refused "segment 5 of '../a film.mkv': ended with status 1" "${step[@]}" 5 "${settings[@]}"
    refused "segment 1 of '../b.mkv': the file does not exist here: mount" "$recipes/step.sh" ../b.mkv b.mkv 1
    refused "'/none' cannot be written: mount" "$recipes/step.sh" '../a film.mkv' /none/b.mkv 1
    refused "make the segments 1 to 4" "${step[@]}" join "${settings[@]}"
}

test_parallel() {
    local port
    port=$(free_ports 1)
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    cp "$work/key.pub" "$work/authorized"
    cat >"$work/sshd.conf" <<TEXT
ListenAddress 127.0.0.1:$port
HostKey "$work/key"
AuthorizedKeysFile "$work/authorized"
PidFile none
StrictModes no
UsePAM no
MaxStartups 50
SetEnv "PATH=$PATH"
TEXT
    cat >"$work/ssh.conf" <<TEXT
Host node?
    HostName 127.0.0.1
    Port $port
    IdentityFile "$work/key"
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
Host lost
    HostName 127.0.0.1
    Port 1
TEXT
    # sshd needs this folder as root.
    [[ $(id -u) -ne 0 ]] || mkdir -p /run/sshd
    /usr/sbin/sshd -D -e -f "$work/sshd.conf" 2>"$work/sshd.txt" &
    daemons+=($!)
    ln -sf "$work/ssh.conf" "$bin/ssh.conf"
    printf '#!/bin/sh\nexec /usr/bin/ssh -F "$(dirname "$0")/ssh.conf" "$@"\n' >"$bin/ssh"
    chmod +x "$bin/ssh"
    until_true 30 ssh node1 true 2>/dev/null || fail "sshd does not answer: $(cat "$work/sshd.txt")"

    printf '../a film.mkv\tout.mkv\n' >films.tsv
    refused "mount '$PWD' and '$recipes' there and install tadsr-train" \
        "$recipes/parallel.sh" films.tsv node1,lost "${settings[@]}"
    test_recipe 1 "$recipes/parallel.sh" films.tsv node1,node2 "${settings[@]}" "${one[@]}"
    says first.txt "segment 3 of '../it's.mp4': ended with status 137" "these are missing: 3;"
}

test_slurm() {
    start_slurm "$work/slurm"
    export CPUS_PER_TASK=1
    test_recipe 1 "$recipes/slurm.sh" films.tsv "${settings[@]}"
    says first.txt "'it's large.mp4' is not complete: see tadsr-"
    cat tadsr-*.log >logs.txt
    says logs.txt "segment 3 of '../it's.mp4': ended with status 137" "these are missing: 3;"
}

test_ray() {
    local port
    port=$(free_ports 1)
    export RAY_ADDRESS=127.0.0.1:$port RAY_USAGE_STATS_ENABLED=0 CPUS_PER_TASK=1
    PATH=$venv/bin:$PATH
    ray start --head --port "$port" --num-cpus 2 --include-dashboard false \
        --temp-dir "$work/ray" --block >ray.txt 2>&1 &
    daemons+=($!)
    until_true 180 grep -qs 'Ray runtime started' ray.txt || fail "Ray does not start: $(tail -n 20 ray.txt)"
    test_recipe 2 "$recipes/upscale_ray.py" films.tsv "${settings[@]}"
    says first.txt "segment 3 of '../it's.mp4': ended with status 137" "segment 3 of '../it's.mp4' failed"
}

# Creates both jobs and runs their pods.
run_pods() {
    "$recipes/tasks.sh" "$1" "${settings[@]}" >tasks.tsv || return 1
    local job lines status=0
    for job in segments:tasks join:films; do
        lines=$(wc -l <"${job#*:}.tsv")
        job=kubernetes-${job%:*}.yaml
        sed "s/completions: .*/completions: $lines/; s/--model small/${settings[*]@Q}/" "$recipes/$job" >"$job"
        "$venv/bin/python" "$root/tests/cluster/kubernetes.py" "$job" . || status=1
    done
    return "$status"
}

test_kubernetes() {
    local file version
    for file in "$recipes"/kubernetes-*.yaml; do
        for version in 1.33 1.37; do
            "$venv/bin/kubernetes-validate" --quiet --strict -k "$version" "$file" || fail "'$file' is no valid Job"
        done
        sed 's/completions:/completion:/' "$file" >wrong.yaml
        refused "completion" "$venv/bin/kubernetes-validate" --strict wrong.yaml
    done
    test_recipe 0 run_pods films.tsv
    says first.txt "segment 3 of '../it's.mp4' ended with status 137" "failed indexes: 6" "these are missing: 3;"
}

prepare
for recipe in steps "$@"; do
    [[ $(type -t "test_$recipe") == function ]] || fail "unknown recipe '$recipe'"
    say "Testing $recipe"
    mkdir "$work/test $recipe"
    cd "$work/test $recipe"
    "test_$recipe"
done
say "All recipes passed: $*"
