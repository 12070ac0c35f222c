# shellcheck shell=bash
# Functions that start and stop a Slurm cluster of two nodes on this machine. This file is sourced.

# start_slurm FOLDER: keeps all files in FOLDER. Sets SLURM_CONF for Slurm's commands.
start_slurm() {
    local folder=$1 user name ports
    user=$(id -un)
    name=$(hostname -s)
    mkdir -p "$folder"/{state,node1,node2}
    # Ports of the controller and of the nodes.
    read -ra ports < <(free_ports 3)
    head -c 1024 /dev/urandom >"$folder/key"
    chmod 600 "$folder/key"
    cat >"$folder/slurm.conf" <<TEXT
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A task that is requeued waits for as long as its credential is valid.
AuthInfo=socket=$folder/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=node1 NodeHostname=$name NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=1
NodeName=node2 NodeHostname=$name NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=1
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
TEXT
    export SLURM_CONF=$folder/slurm.conf
    munged --foreground --force --key-file="$folder/key" --socket="$folder/munge" --num-threads=2 \
        --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" --log-file="$folder/munge.log" \
        >"$folder/munged.txt" 2>&1 &
    daemons+=($!)
    until_true 30 test -S "$folder/munge" || fail "munged does not start: $(tail -n 3 "$folder/munged.txt")"
    slurmctld -D -c >"$folder/slurmctld.txt" 2>&1 &
    daemons+=($!)
    local node
    for node in node1 node2; do
        slurmd -D -N "$node" >"$folder/$node.txt" 2>&1 &
        daemons+=($!)
    done
    until_true 60 slurm_is_ready || fail "Slurm does not start; its logs are in $folder:
$(tail -n 3 "$folder"/*.txt)"
}

slurm_is_ready() { [[ $(sinfo --noheader --format='%D %t' 2>/dev/null) == '2 idle' ]]; }
