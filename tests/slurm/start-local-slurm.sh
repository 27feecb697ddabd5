#!/usr/bin/env bash
# Start a real Slurm cluster of one node, or two, on the loopback interface, for tests.
#
#   start-local-slurm.sh [DIR] [--cpus N] [--gpus N] [--accounting] [--no-install]
#                        [--second-node]
#
#   DIR            where the whole cluster lives: config, keys, state, spool,
#                  logs, pid files.  Default: ${TMPDIR:-/tmp}/local-slurm.
#   --cpus N       CPUs the node announces (default: what nproc says; Slurm
#                  only counts them, so N may exceed the real number).
#   --gpus N       announce N pretend GPUs, so that a job asking for
#                  gpus_per_node=1 can be scheduled.  No device is behind them.
#   --max-array N  MaxArraySize (default 10001): how many elements a job array may have.
#   --second-node  also start node1, on this machine like node0; jobs reach it only
#                  through the partition "pair", which holds both nodes.
#   --accounting   also run slurmdbd on a private MariaDB, so that the real
#                  `sacct` answers.  Without it, DIR/bin/sacct is a small
#                  stand-in that answers from `scontrol`.  (slurmdbd has no
#                  setting to keep it to loopback; every other daemon is kept.)
#   --no-install   fail instead of calling apt-get when a program is missing.
#
# Afterwards:   . DIR/env.sh      (sets SLURM_CONF, PATH, ...)   then sbatch, squeue, ...
# To stop:      stop-local-slurm.sh [DIR] [--wipe]
#
# Needs root on Debian 12 (Slurm 22.05).  Safe to call again: a running cluster
# is left as it is.  Nothing outside DIR is written but Debian's own packages;
# /etc/slurm and /etc/munge are neither read nor changed, and no service that
# the machine already runs is touched.
set -euo pipefail

die() { echo "start-local-slurm: $*" >&2; exit 1; }
say() { echo "start-local-slurm: $*"; }

dir=${TMPDIR:-/tmp}/local-slurm
cpus=$(nproc)
gpus=0
accounting=no
install=yes
nodes=(node0)
max_array=10001
while [ $# -gt 0 ]; do
    case $1 in
        --cpus) cpus=${2:?--cpus needs a number}; shift ;;
        --gpus) gpus=${2:?--gpus needs a number}; shift ;;
        --max-array) max_array=${2:?--max-array needs a number}; shift ;;
        --second-node) nodes=(node0 node1) ;;
        --accounting) accounting=yes ;;
        --no-install) install=no ;;
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) die "unknown option $1 (see --help)" ;;
        *) dir=$1 ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || die "must run as root"

# ---------------------------------------------------------------- programs --
missing=()
need() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("$2"); }
need munged munge
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
if [ "$accounting" = yes ]; then
    need slurmdbd slurmdbd
    need mariadbd mariadb-server
fi
if [ ${#missing[@]} -gt 0 ]; then
    [ "$install" = yes ] || die "not installed: ${missing[*]}"
    say "installing ${missing[*]}"
    # Keep the packages from starting system-wide services of their own.
    policy=/usr/sbin/policy-rc.d
    made_policy=no
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
        made_policy=yes
    fi
    log=$(mktemp)
    ok=yes
    { apt-get update && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 || ok=no
    [ $made_policy = no ] || rm -f $policy
    [ $ok = yes ] || { tail -n 20 "$log" >&2; die "apt-get failed (log above)"; }
    rm -f "$log"
fi
export PATH=/usr/sbin:/sbin:$PATH

# ------------------------------------------------------------------ layout --
# Socket paths may be at most about 100 bytes long, so DIR should be short.
mkdir -p "$dir"
dir=$(cd "$dir" && pwd -P)
[ ${#dir} -le 70 ] || die "DIR is too long for a unix socket path: $dir"
if [ ! -e "$dir/.local-slurm" ] && [ -n "$(ls -A "$dir")" ]; then
    die "$dir is neither empty nor a directory made by this script"
fi
chmod 755 "$dir"
touch "$dir/.local-slurm"          # stop --wipe deletes only a directory with this mark
mkdir -p "$dir"/{bin,etc,log,run,state,spool}

export SLURM_CONF=$dir/etc/slurm.conf
host=$(hostname -s)
mem_mb=$(awk '/^MemTotal/ {print int($2 / 1024) - 64}' /proc/meminfo)

# A pid is ours when the process exists and its command line or environment names DIR.
ours() {
    [ -s "$1" ] && cat "/proc/$(cat "$1")/cmdline" "/proc/$(cat "$1")/environ" 2>/dev/null | grep -qaF -- "$dir/"
}
failed() { tail -n 15 "$dir/log/$1".* >&2 || true; die "$1 did not come up (log above)"; }
up() {   # every node
    [ "$(sinfo --noheader --Node --format='%N %T' 2>/dev/null | grep -E ' (idle|mixed|allocated|completing)' \
        | cut -d' ' -f1 | sort -u | wc -l)" = ${#nodes[@]} ]
}
all_ours() { local node; for node in "${nodes[@]}"; do ours "$dir/run/slurmd-$node.pid" || return 1; done; }

if ours "$dir/run/munged.pid" && ours "$dir/run/slurmctld.pid" && all_ours && up; then
    say "already running; . $dir/env.sh"
    exit 0
fi

# Three free loopback ports for the daemons (four with accounting), kept over restarts.
free_port() {
    local p
    for p in $(seq "$1" $(($1 + 200))); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null; then echo "$p"; return; fi
    done
    die "no free port near $1"
}
if [ ! -s "$dir/etc/ports" ]; then
    ctld_port=$(free_port 26817)
    slurmd_port=$(free_port $((ctld_port + 1)))
    second_port=$(free_port $((slurmd_port + 1)))
    dbd_port=$(free_port $((second_port + 1)))
    echo "ctld_port=$ctld_port slurmd_port=$slurmd_port second_port=$second_port dbd_port=$dbd_port" > "$dir/etc/ports"
fi
# shellcheck disable=SC1091  # written just above
. "$dir/etc/ports"

# ------------------------------------------------------------------- munge --
# Every message between the daemons and the commands is signed with this key.
[ -s "$dir/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$dir/etc/munge.key")
chmod 400 "$dir/etc/munge.key"
if ! ours "$dir/run/munged.pid"; then
    rm -f "$dir"/run/munge.sock*
    munged --force --num-threads=2 \
        --socket="$dir/run/munge.sock" --key-file="$dir/etc/munge.key" \
        --pid-file="$dir/run/munged.pid" --seed-file="$dir/run/munged.seed" \
        --log-file="$dir/log/munged.log" 2>>"$dir/log/munged.stderr" \
        || { tail -n 5 "$dir/log/munged.stderr" >&2; die "munged did not start"; }
fi

# -------------------------------------------------------------- slurm.conf --
storage="AccountingStorageType=accounting_storage/none"
if [ "$accounting" = yes ]; then
    storage="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$dbd_port
AccountingStoragePass=$dir/run/munge.sock"
fi
gres=
node_gres=
if [ "$gpus" -gt 0 ]; then
    gres="GresTypes=gpu"
    node_gres="Gres=gpu:$gpus"
    # slurmd drops GPUs without a character device: give it copies of /dev/null.
    mkdir -p "$dir/dev"
    : > "$dir/etc/gres.conf"
    for i in $(seq 0 $((gpus - 1))); do
        [ -c "$dir/dev/gpu$i" ] || mknod "$dir/dev/gpu$i" c 1 3 || die "mknod is not allowed here: no --gpus"
        echo "NodeName=node0 Name=gpu File=$dir/dev/gpu$i" >> "$dir/etc/gres.conf"
    done
else
    rm -f "$dir/etc/gres.conf"
fi
cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld_port
# Listen on the loopback address only.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may run again (default 120 s).
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# No cgroups, no CPU binding, no kernel features a container may lack.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# Schedule at once, and kill at once: tests should not wait.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=3
OverTimeLimit=0
MaxArraySize=$max_array
MaxJobCount=20000
# Ended jobs stay visible to scontrol for a day (the sacct stand-in reads them).
MinJobAge=86400
# Believe the counts below, not the hardware.
SlurmdParameters=config_overrides
# A node that was down comes back by itself; a preempted job goes back in the queue.
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Send a preempted job its --signal first (submitit checkpoints on it).
SlurmctldParameters=preempt_send_user_signal
$storage
$gres
NodeName=node0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$slurmd_port CPUs=$cpus RealMemory=$mem_mb $node_gres State=UNKNOWN
# A job in "high" pushes jobs of the others back into the queue: those of "main"
# get their --signal and 20 s to save their work, those of "spot" are killed at once.
PartitionName=main Nodes=node0 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=spot Nodes=node0 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=high Nodes=node0 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=off
CONF
if [ ${#nodes[@]} -gt 1 ]; then
    cat >> "$SLURM_CONF" <<CONF
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second_port CPUs=$cpus RealMemory=$mem_mb State=UNKNOWN
PartitionName=pair Nodes=node0,node1 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
CONF
fi
: > "$dir/etc/cgroup.conf"

# --------------------------------------------------------------- env.sh ----
cat > "$dir/env.sh" <<ENV
# Source this to talk to the cluster in $dir
export SLURM_CONF=$SLURM_CONF
case :\$PATH: in *:$dir/bin:*) ;; *) export PATH=$dir/bin:\$PATH ;; esac
ENV

# ------------------------------------------------------ sacct, real or not --
if [ "$accounting" = yes ]; then
    rm -f "$dir/bin/sacct"
    if ! ours "$dir/run/mariadbd.pid"; then
        if [ ! -d "$dir/db/mysql" ]; then
            mariadb-install-db --no-defaults --user=root --datadir="$dir/db" \
                --auth-root-authentication-method=socket --skip-test-db \
                >"$dir/log/mariadb-install.log" 2>&1 \
                || { tail -n 5 "$dir/log/mariadb-install.log" >&2; die "mariadb-install-db failed"; }
        fi
        mariadbd --no-defaults --user=root --datadir="$dir/db" --skip-networking \
            --socket="$dir/run/mariadb.sock" --pid-file="$dir/run/mariadbd.pid" \
            --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
            --log-error="$dir/log/mariadbd.log" >/dev/null 2>&1 &
        disown
        for _ in $(seq 100); do [ -S "$dir/run/mariadb.sock" ] && break; sleep 0.2; done
        mariadb --no-defaults --socket="$dir/run/mariadb.sock" \
            -e 'CREATE DATABASE IF NOT EXISTS slurm_acct_db' || die "mariadbd did not start"
    fi
    if ! ours "$dir/run/slurmdbd.pid"; then
        cat > "$dir/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$dbd_port
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageLoc=slurm_acct_db
StorageUser=root
CONF
        chmod 600 "$dir/etc/slurmdbd.conf"
        MYSQL_UNIX_PORT=$dir/run/mariadb.sock slurmdbd 2>"$dir/log/slurmdbd.stderr" || failed slurmdbd
        knows() { timeout 5 sacctmgr --noheader show cluster 2>/dev/null; }
        for _ in $(seq 100); do knows >/dev/null && break; sleep 0.2; done
        knows >/dev/null || failed slurmdbd
        knows | grep -qw local || sacctmgr --immediate add cluster local >/dev/null
    fi
else
    cat > "$dir/bin/sacct" <<'SHIM'
#!/usr/bin/env bash
# Stand-in for sacct on a cluster without accounting.  Understands what submitit
# asks (-o JobID,State,NodeList --parsable2 -j ID ...), whatever the -o fields.
ids=()
while [ $# -gt 0 ]; do
    case $1 in
        -j|--jobs) ids+=(${2//,/ }); shift ;;
        --jobs=*) v=${1#*=}; ids+=(${v//,/ }) ;;
        -o|--format) shift ;;
    esac
    shift
done
echo "JobID|State|NodeList"
for id in "${ids[@]}"; do
    scontrol --oneliner show job "$id" 2>/dev/null
done | awk '{
    delete f
    for (i = 1; i <= NF; i++) { k = index($i, "="); if (k) { n = substr($i, 1, k - 1); if (!(n in f)) f[n] = substr($i, k + 1) } }
    if (f["JobId"] == "") next
    id = f["JobId"]
    if ("ArrayJobId" in f) {
        t = f["ArrayTaskId"]
        id = f["ArrayJobId"] "_" (t ~ /^[0-9]+$/ ? t : "[" t "]")
    }
    n = f["NodeList"]; if (n == "" || n == "(null)") n = "None assigned"
    print id "|" f["JobState"] "|" n
}'
SHIM
    chmod +x "$dir/bin/sacct"
fi

# ----------------------------------------------------------------- daemons --
answers() { scontrol ping 2>/dev/null | grep -q 'is UP'; }

if ! ours "$dir/run/slurmctld.pid"; then
    slurmctld -f "$SLURM_CONF" 2>"$dir/log/slurmctld.stderr" || failed slurmctld
fi
for _ in $(seq 100); do answers && break; sleep 0.1; done
answers || failed slurmctld

for node in "${nodes[@]}"; do
    ours "$dir/run/slurmd-$node.pid" && continue
    mkdir -p "$dir/spool/$node"
    slurmd -f "$SLURM_CONF" -N "$node" 2>"$dir/log/slurmd-$node.stderr" || failed "slurmd-$node"
done
for _ in $(seq 150); do up && break; sleep 0.1; done
up || failed slurmd-node0

say "up: ${#nodes[@]} node(s) of $cpus cpus, $gpus pretend gpus, accounting=$accounting; . $dir/env.sh"
