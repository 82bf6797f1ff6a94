#!/bin/bash
# A real SLURM cluster on one machine, for tests: slurmctld and a slurmd per node, each node with its own host name,
# address and processes in namespaces of Linux. Nothing of the machine is changed, and all of it is gone when `up` ends.
#
#   cluster.sh up DIR NODES       bring it up and stay; DIR/ready appears when every node is idle; ends with SIGKILL too
#   cluster.sh in DIR CMD ...     run CMD as on the cluster's login node
#   cluster.sh on DIR N CMD ...   run CMD on node N
#   cluster.sh kill DIR N         node N loses power: all its processes die at once
#   cluster.sh start DIR N        and comes back
#
# Needs root, and on Debian or Ubuntu: apt-get install --no-install-recommends slurmctld slurmd slurm-client iproute2
# No secrets: authentication is off (auth/none), and the network is reachable from this machine's namespaces only.
# DOWN_AFTER (seconds, default 10): when a silent node counts as dead. GRACE (default 20): between a preemption and its
# end. PROCTRACK: how SLURM finds the processes of a job (linuxproc; most clusters have cgroup).
set -euo pipefail

SELF=$(readlink -f "$0")
NETWORK=10.77.0
PATH=$PATH:/usr/sbin:/sbin
NAMESPACES=(--net --uts --mount --pid)

apart() { exec unshare "${NAMESPACES[@]}" --fork --kill-child=KILL --mount-proc "$@"; }
inside() { # PID CMD ...: in the namespaces of a process
  local pid=$1
  shift
  exec nsenter --target "$pid" "${NAMESPACES[@]}" --wdns="$PWD" -- "$@"
}

configure() {
  local node nodes=$1
  mkdir -p "$DIR"/{log,run,state,spool,dev}
  {
    echo "127.0.0.1 localhost"
    echo "$NETWORK.1 login"
    for node in $(seq "$nodes"); do echo "$NETWORK.$((10 + node)) n$node"; done
  } >"$DIR/hosts"
  # SLURM wants GPUs to be character devices; they are only counted here.
  for node in 0 1; do ln -sf /dev/null "$DIR/dev/gpu$node"; done
  echo "NodeName=n[1-$nodes] Name=gpu Count=2 File=$DIR/dev/gpu[0-1]" >"$DIR/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf" # slurmd starts where /sys/fs/cgroup is not mounted
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login($NETWORK.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/${PROCTRACK:-linuxproc}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=100
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=${DOWN_AFTER:-10}
KillWait=30
MinJobAge=3600
NodeName=n[1-$nodes] NodeAddr=$NETWORK.[11-$((10 + nodes))] CPUs=8 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1 GraceTime=${GRACE:-20}
PartitionName=urgent Nodes=ALL DefaultTime=60 PriorityTier=10 PreemptMode=OFF
CONF
}

start_node() { # runs on the login node
  local node=$1 outer child=
  rm -f "$DIR/run/n$node.linked"
  (apart bash -c 'hostname "n$1"
    until [ -e "$2/run/n$1.linked" ]; do sleep 0.05; done
    slurmd -D -N "n$1"' _ "$node" "$DIR") </dev/null >>"$DIR/log/n$node.out" 2>&1 &
  outer=$!
  # The first process inside has its own network only once it runs.
  until [ -n "$child" ] && [ "$(readlink "/proc/$child/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do
    sleep 0.02
    read -r child _ <"/proc/$outer/task/$outer/children" || true
  done
  ip link delete "v$node" 2>/dev/null || true
  ip link add "v$node" type veth peer name eth0 netns "$child"
  ip link set "v$node" master bridge0 up
  nsenter --target "$child" --net ip address add "$NETWORK.$((10 + node))/24" dev eth0
  nsenter --target "$child" --net ip link set eth0 up
  nsenter --target "$child" --net ip link set lo up
  echo "$child" >"$DIR/run/n$node.inner"
  echo "$outer" >"$DIR/run/n$node.outer"
  touch "$DIR/run/n$node.linked"
}

controller() {
  local nodes=$1
  hostname login
  mount --bind "$DIR/hosts" /etc/hosts # in this mount namespace only
  ip link set lo up
  ip link add bridge0 type bridge
  ip address add "$NETWORK.1/24" dev bridge0
  ip link set bridge0 up
  slurmctld
  for node in $(seq "$nodes"); do start_node "$node"; done
  until [ "$(sinfo --noheader --partition=main --states=idle --format=%D)" = "$nodes" ]; do sleep 0.1; done
  touch "$DIR/ready"
  while :; do sleep 3600; done
}

login_pid() { pgrep --parent "$(cat "$DIR/up.pid")" | head -n 1; }

action=$1 DIR=$(realpath -m "$2")
shift 2
PATH=${PATH//"$DIR/tools:"/} # what a test has there to come in from outside
export DIR SLURM_CONF=$DIR/slurm.conf
case $action in
  up)
    configure "$1"
    echo $$ >"$DIR/up.pid"
    apart "$SELF" controller "$DIR" "$1"
    ;;
  controller) controller "$1" ;;
  in) inside "$(login_pid)" "$@" ;;
  on)
    node=$1
    shift
    # numbers of processes are the login node's
    inside "$(login_pid)" nsenter --target "$(cat "$DIR/run/n$node.inner")" "${NAMESPACES[@]}" --wdns="$PWD" -- "$@"
    ;;
  kill) inside "$(login_pid)" bash -c 'kill -KILL "$(cat "$1")"' _ "$DIR/run/n$1.outer" ;;
  start) inside "$(login_pid)" "$SELF" start-inside "$DIR" "$1" ;;
  start-inside)
    start_node "$1"
    ;;
  *)
    sed -n '2,12p' "$SELF"
    exit 2
    ;;
esac
