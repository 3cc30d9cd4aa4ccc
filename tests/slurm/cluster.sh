#!/usr/bin/env bash
# A SLURM cluster on one Linux machine, for tests: a real slurmctld, and nodes that are namespaces with a real slurmd each.
#
#   cluster.sh up [--for PID]   start it, as root; installs the Debian packages that are missing; once more: repairs it.
#                               With --for it is taken down when that process has ended, however it has. Exit 3 where this
#                               machine cannot: no root, no namespaces, no packages to be had, or it serves another process
#   eval "$(cluster.sh env)"    SLURM_CONF, for sbatch, srun and the others
#   cluster.sh status           nodes and jobs
#   cluster.sh off|on NODE      power cut: every process of the node is gone at once; power back
#   cluster.sh unplug|plug NODE its network cable
#   cluster.sh exec NODE CMD... run a command on a node
#   cluster.sh down             stop all of it, whatever state it is in; leaves nothing but the Debian packages
#
# A node has its own network, host name, process table, mounts and /dev/shm. Each checkout has a cluster of its own, and they
# do not meet. From the environment at the first `up`: MEGALM_CLUSTER_DIR (/run/megalm-cluster- and a number of the checkout's
# path), _NODES (3), _CPUS (8) and _GPUS (2) of each, _NET and _PORT (10.78.N and 16900 + 2 N, the first that are free),
# _TRACKING of a job's processes (cgroup where there is the freezer of cgroup v1, else linuxproc: the process table).
# The GPUs are pretended: SLURM counts them and sets CUDA_VISIBLE_DEVICES, CUDA finds none.
set -euo pipefail

SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/${BASH_SOURCE[0]##*/}
number_of() { printf '%06x' $(($(cksum <<<"$1" | cut -d' ' -f1) % 16777216)); }
DIR=${MEGALM_CLUSTER_DIR:-/run/megalm-cluster-$(number_of "${SELF%/*/*/*}")}
# shellcheck source=/dev/null
[ ! -s "$DIR/settings" ] || source "$DIR/settings"
NODES=${MEGALM_CLUSTER_NODES:-3} CPUS=${MEGALM_CLUSTER_CPUS:-8} GPUS=${MEGALM_CLUSTER_GPUS:-2}
NET=${MEGALM_CLUSTER_NET:-} PORT=${MEGALM_CLUSTER_PORT:-} TRACKING=${MEGALM_CLUSTER_TRACKING:-auto}
NAME=mg$(number_of "$DIR") # of the switch; cables, network namespaces and the control group begin with it
export MEGALM_CLUSTER_DIR=$DIR SLURM_CONF=$DIR/slurm.conf

die() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# Not here: the reason, and exit 3. A cluster that is up already stays.
unable() {
    echo "cluster.sh: $*" >&2
    [ -s "$DIR/settings" ] || rm -rf "$DIR" 2>/dev/null || true
    exit 3
}

each_node() { seq -f 'n%g' "$NODES"; }
link_of() { echo "$NAME$1"; }

# Whether the pid file names a process that we started: its command line holds our folder. A zombie's is empty.
runs() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && grep -qsF "$DIR" "/proc/$pid/cmdline"
}

# stop SIGNAL PIDFILE: returns when the process is gone; SIGKILL after 5 s.
stop() {
    local i
    runs "$2" || return 0
    kill "-$1" "$(cat "$2")" 2>/dev/null || true
    for i in $(seq 100); do
        runs "$2" || break
        [ "$i" != 50 ] || kill -KILL "$(cat "$2")" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$2"
}

install_packages() {
    local pair missing=()
    for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client ip:iproute2; do
        command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "cluster.sh: installing ${missing[*]}" >&2
    local apt=(timeout 300 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    if ! { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends \
        "${missing[@]}" slurm-wlm-basic-plugins; } >"$DIR/log/apt" 2>&1 </dev/null; then
        tail -n 20 "$DIR/log/apt" >&2
        unable "cannot install ${missing[*]}"
    fi
}

# Real clusters track a job's processes by cgroups: a signal then reaches srun's own tasks only, and no orphan is lost.
# By the process table a signal reaches every descendant. All freezers of a machine are one tree, in which slurmd names its
# branch after the node: each cluster gets a branch of its own to stand on.
choose_tracking() {
    local tree=$DIR/cgroup/tree
    mkdir -p "$DIR/cgroup/freezer"
    if [ "$TRACKING" != linuxproc ]; then
        if mountpoint -q "$DIR/cgroup/freezer"; then
            TRACKING=cgroup
        elif mkdir -p "$tree" && mount -t cgroup -o freezer cgroup "$tree" 2>/dev/null; then
            mkdir -p "$tree/$NAME"
            mount --bind "$tree/$NAME" "$DIR/cgroup/freezer"
            umount "$tree"
            TRACKING=cgroup
        elif [ "$TRACKING" = cgroup ]; then
            unable "no freezer of cgroup v1 here"
        else
            TRACKING=linuxproc
        fi
    fi
    [ "$TRACKING" = cgroup ] || [ "$TRACKING" = linuxproc ] || die "_TRACKING is cgroup or linuxproc, not $TRACKING"
}

is_free() { # NET PORT
    ! ip -o -4 address show | grep -qF " $1." && ! (: <>"/dev/tcp/127.0.0.1/$2") 2>/dev/null &&
        ! (: <>"/dev/tcp/127.0.0.1/$(($2 + 1))") 2>/dev/null
}

# A network and two ports that nobody has. Two clusters that start at once take turns; the lock is a folder that is there anyway.
take_network() {
    local i n
    if [ -z "$NET" ] || [ -z "$PORT" ]; then
        for i in $(seq 0 199); do
            n=$(((16#${NAME#mg} + i) % 200))
            NET=10.78.$n PORT=$((16900 + 2 * n))
            ! is_free "$NET" "$PORT" || break
            [ "$i" != 199 ] || unable "no free network 10.78.N and port"
        done
    fi
    # a later `up` with other settings must not rewrite the configuration of a running cluster
    declare -p NODES CPUS GPUS NET PORT TRACKING | sed 's/^declare -- /MEGALM_CLUSTER_/' >"$DIR/settings"
    ip link show "$NAME" >/dev/null 2>&1 || ip link add "$NAME" type bridge || give_up "this machine makes no bridges"
    ip address replace "$NET.1/24" dev "$NAME"
    ip link set "$NAME" up
}

# Not here, found when something has been made already.
give_up() {
    (down) || true
    unable "$*"
}

write_config() {
    local i last=$((10 + NODES))
    {
        echo "127.0.0.1 localhost"
        echo "$NET.1 $(hostname -s)"
        for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) n$i"; done
    } >"$DIR/hosts"
    # slurmd 22.05 looks for cgroups also where nothing uses them, and ends if it finds none; naming v1 spares it the look.
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\n' "$DIR/cgroup" >"$DIR/cgroup.conf"
    : >"$DIR/gres.conf"
    if [ "$GPUS" -gt 0 ]; then # a GPU is counted only where it has a device file, and /dev/null's numbers will do
        for i in $(seq 0 $((GPUS - 1))); do
            [ -e "$DIR/gpu$i" ] || mknod "$DIR/gpu$i" c 1 3 || give_up "this machine makes no device files"
        done
        echo "NodeName=n[1-$NODES] Name=gpu File=$DIR/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=megalm
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=$PORT
SlurmdPort=$((PORT + 1))
# all clusters of a machine share its /tmp, where a job's number is a file's name
FirstJobId=$((1000 * (PORT % 1000) + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits: 120 s by default
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/spool/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdLogFile=$DIR/log/slurmd-%n
MailProg=/bin/true
ProctrackType=proctrack/$TRACKING
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# the numbers below count, not what slurmd finds
SlurmdParameters=config_overrides
# without it a job that is preempted gets TERM, but not the signal that it asked for
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
PriorityType=priority/basic
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
MessageTimeout=10
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=n[1-$NODES] NodeAddr=$NET.[11-$last] CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    [ "$GPUS" -gt 0 ] || sed -i 's/ Gres=gpu:0//' "$SLURM_CONF"
    cat >"$DIR/boot" <<'BOOT'
#!/usr/bin/env bash
# The first process of a node: gives it what is its own and keeps slurmd running. Reaps what nobody waits for.
dir=$1 name=$2
mount --make-rprivate / && mount --bind "$dir/hosts" /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
hostname "$name" || exit 1
while :; do
    slurmd -D -N "$name" -f "$dir/slurm.conf" >>"$dir/log/slurmd-$name.out" 2>&1
    sleep 1
done
BOOT
    chmod 755 "$DIR/boot"
}

start_munge() {
    local munge=$DIR/munge
    mkdir -p "$munge"
    chmod 755 "$munge"
    ! runs "$munge/pid" || return 0
    [ -s "$munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$munge/key")
    rm -f "$munge"/socket*
    munged --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed"
}

lay_cables() {
    local node link i=10
    for node in $(each_node); do
        i=$((i + 1)) link=$(link_of "$node")
        [ -e "/run/netns/$link" ] || ip netns add "$link" || give_up "this machine makes no network namespaces"
        ip link show "$link" >/dev/null 2>&1 || ip link add "$link" type veth peer name eth0 netns "$link" ||
            give_up "this machine makes no virtual cables"
        ip link set "$link" master "$NAME" up
        ip -n "$link" link set lo up
        ip -n "$link" address replace "$NET.$i/24" dev eth0
        ip -n "$link" link set eth0 up
    done
}

on() {
    ! runs "$DIR/$1.pid" || return 0
    mkdir -p "$DIR/spool/$1"
    setsid ip netns exec "$(link_of "$1")" unshare --mount --uts --pid --fork --mount-proc --kill-child=KILL \
        "$DIR/boot" "$DIR" "$1" </dev/null >>"$DIR/log/boot-$1" 2>&1 &
    echo $! >"$DIR/$1.pid"
}

off() { stop KILL "$DIR/$1.pid"; } # with its first process the kernel ends every other one of a node

ready_nodes() { timeout 5 sinfo -h -N -p train -t idle,alloc,mix,comp -o %N 2>/dev/null | sort -u | wc -l; }

# When a process began; nothing for one that has ended, be it a zombie.
birth_of() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; }

# Takes the cluster down when process $1, begun at $2, has ended: also a run of the tests that is killed leaves nothing.
keep() {
    while [ "$(birth_of "$1")" = "$2" ]; do sleep 1; done
    down
}

serve() {
    local owner keeper=$DIR/keeper.pid
    if runs "$keeper"; then
        owner=$(cat "$DIR/owner")
        [ "$owner" = "$1" ] || [ -z "$(birth_of "$owner")" ] || unable "the cluster in $DIR serves process $owner"
        stop KILL "$keeper"
    fi
    echo "$1" >"$DIR/owner"
    setsid bash "$SELF" keep "$1" "$(birth_of "$1")" "$DIR" </dev/null >>"$DIR/log/keeper" 2>&1 &
    echo $! >"$keeper"
}

up() {
    local node end
    [ "$(id -u)" = 0 ] || unable "needs root"
    unshare --net --uts --mount --pid --fork mount -t tmpfs tmpfs /tmp 2>/dev/null || unable "this machine makes no namespaces"
    command -v slurmctld apt-get >/dev/null || unable "neither slurmctld nor apt-get is here"
    mkdir -p "$DIR"/{log,state,spool}
    chmod 755 "$DIR"
    install_packages
    [ "${1:-}" != --for ] || serve "${2:?which process}"
    { flock 9 && choose_tracking && take_network; } 9</run
    write_config
    start_munge
    lay_cables
    runs "$DIR/slurmctld.pid" || slurmctld -f "$SLURM_CONF" >"$DIR/log/slurmctld.out" 2>&1 ||
        die "slurmctld does not start: $(cat "$DIR/log/slurmctld.out")"
    for node in $(each_node); do on "$node"; done
    end=$((SECONDS + 90))
    until [ "$(ready_nodes)" = "$NODES" ]; do
        [ $SECONDS -lt $end ] || { tail -n 5 "$DIR"/log/* >&2 && die "the nodes do not come up"; }
        sleep 0.2
    done
    sinfo -N -p train
}

# Processes of ours that no pid file names: whoever started them was killed before it could write one.
strays() {
    local entry
    grep -lsF "$DIR" /proc/[0-9]*/cmdline | while read -r entry; do
        case $(cat "${entry%cmdline}comm" 2>/dev/null) in
        slurmctld | munged | boot | unshare) echo "${entry//[^0-9]/}" ;;
        esac
    done
}

down() {
    local pid link
    [ "$(cat "$DIR/keeper.pid" 2>/dev/null)" = $$ ] || stop KILL "$DIR/keeper.pid"
    for link in "$DIR"/n*.pid; do off "$(basename "$link" .pid)"; done
    stop TERM "$DIR/slurmctld.pid"
    stop TERM "$DIR/munge/pid"
    for pid in $(strays); do kill -KILL "$pid" 2>/dev/null || true; done
    for link in $(ip -o link show | grep -oE "^[0-9]+: ${NAME}[^@:]*" | cut -d' ' -f2); do
        ip link delete "$link" 2>/dev/null || true
    done
    for link in /run/netns/"$NAME"*; do [ ! -e "$link" ] || ip netns delete "${link##*/}" || true; done
    if mountpoint -q /run/netns && [ -z "$(ls -A /run/netns)" ]; then umount /run/netns && rmdir /run/netns; fi
    fell_cgroup
    rm -rf "$DIR"
}

fell_cgroup() {
    local tree=$DIR/cgroup/tree i
    ! mountpoint -q "$DIR/cgroup/freezer" || umount "$DIR/cgroup/freezer"
    mkdir -p "$tree"
    mountpoint -q "$tree" || mount -t cgroup -o freezer cgroup "$tree" 2>/dev/null || return 0
    for i in $(seq 50); do # the last processes of a node are still on their way
        [ -d "$tree/$NAME" ] || break
        find "$tree/$NAME" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
    done
    umount "$tree"
}

case ${1:-} in
up | down | keep) "$@" ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
status) sinfo -N -l && squeue ;;
on | off) "$1" "${2:?which node}" ;;
unplug) ip link set "$(link_of "${2:?which node}")" down ;;
plug) ip link set "$(link_of "${2:?which node}")" up ;;
exec)
    first=$(pgrep -P "$(cat "$DIR/${2:?which node}.pid")")
    shift 2
    exec nsenter -t "$first" -a "$@"
    ;;
*)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
