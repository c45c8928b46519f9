#!/usr/bin/env bash
# A real Slurm on one machine, for tests: a controller and any number of nodes, each with its own address, hostname and
# process table. Needs root, and the packages slurm-wlm, munge and iproute2. Everything is in FOLDER and in namespaces:
# nothing is added to the machine's own network, and when the nodes' first processes are gone, everything is.
#
#   cluster.sh up FOLDER [NODES] [PREFIX]    4 nodes called n1 to n4, unless told otherwise; about a second
#   cluster.sh run FOLDER COMMAND ...        a command on the controller, which is the login node too
#   cluster.sh crash FOLDER NODE             the network goes first, then every process at once
#   cluster.sh kill FOLDER NODE              every process at once; the others see its connections break
#   cluster.sh start FOLDER NODE             the node comes back
#   cluster.sh down FOLDER
#   cluster.sh session FOLDER [NODES] [PREFIX]   up, says "ready", and down when its standard input ends
set -euo pipefail

# A host is a process in namespaces of its own, whose death ends all that runs in it. The files <host>.pid name them.
NET=10.77.0
CONTROLLER=controller

main() {
  command=$1 folder=$(realpath -m "$2"); shift 2
  self=$(realpath "$0")
  export SLURM_CONF=$folder/slurm.conf
  case $command in
    up) up "$@" ;;
    down) down ;;
    run) on "$CONTROLLER" "$@" ;;
    crash) on "$1" ip link set eth0 down; sleep 0.2; stop_host "$1" ;;
    kill) stop_host "$1" ;;
    start) start_host "$1"; wait_for_idle ;;
    session)
      trap down EXIT
      up "$@"
      echo ready
      cat > /dev/null ;;
    host) be_host "$1" ;;   # what a host's first process runs
    *) sed -n '6,12s/^# *//p' "$self" >&2; exit 2 ;;
  esac
}

up() {
  local count=${1:-4} prefix=${2:-n} i
  mkdir -p "$folder"/{state,dev}
  for i in 0 1; do [ -e "$folder/dev/gpu$i" ] || mknod -m 666 "$folder/dev/gpu$i" c 1 3; done   # /dev/null as a GPU
  { echo "127.0.0.1 localhost"; echo "$NET.254 $CONTROLLER"; } > "$folder/hosts"
  # the second line of each: torch looks up the names of peers by their v4-mapped address
  for i in $(seq "$count"); do printf '%s %s\n' "$NET.$i" "$prefix$i" "::ffff:$NET.$i" "$prefix$i"; done >> "$folder/hosts"
  echo "hosts: files" > "$folder/nsswitch.conf"
  write_configuration "$count" "$prefix"
  dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
  chmod 400 "$folder/munge.key"
  start_host "$CONTROLLER"
  for i in $(seq "$count"); do start_host "$prefix$i"; done
  wait_for_idle
}

write_configuration() {
  local count=$1 prefix=$2 i
  sed "s|@FOLDER@|$folder|g; s|@CONTROLLER@|$CONTROLLER($NET.254)|; s|@NODES@|${prefix}[1-$count]|" \
    "$(dirname "$self")/slurm.conf" > "$folder/slurm.conf"
  for i in $(seq "$count"); do echo "NodeName=$prefix$i NodeAddr=$NET.$i"; done > "$folder/nodes.conf"
  echo "NodeName=${prefix}[1-$count] Name=gpu File=$folder/dev/gpu[0-1]" > "$folder/gres.conf"
  echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf"   # none is used, but slurmd looks for the mount of v2 otherwise
}

# --- hosts

start_host() {
  local name=$1 peer=
  # </dev/null and the log: nothing of a host may hold on to the pipes of whoever called
  setsid unshare --fork --kill-child --pid --mount-proc --mount --uts --net "$self" host "$folder" "$name" \
    < /dev/null >> "$folder/$name.log" 2>&1 &
  local unshared=$!
  for _ in $(seq 100); do
    read -r peer < "/proc/$unshared/task/$unshared/children" || true   # no newline ends it
    [ -z "$peer" ] || break
    sleep 0.02
  done
  echo "${peer:?$name did not start; see $folder/$name.log}" > "$folder/$name.pid"
  if [ "$name" != "$CONTROLLER" ]; then   # a cable from the controller's bridge
    local address; address=$(awk -v name="$name" '$2 == name {print $1; exit}' "$folder/hosts")
    on "$CONTROLLER" sh -c "ip link del v${address##*.} 2> /dev/null; exit 0"
    # the new host's network is named by its process in the machine's own process table, so this runs outside of both
    ip link add "t$peer" type veth peer name eth0 netns "$peer"
    ip link set "t$peer" netns "$(cat "$folder/$CONTROLLER.pid")" name "v${address##*.}"
    on "$CONTROLLER" ip link set "v${address##*.}" master br0 up
    nsenter --target "$peer" --net ip addr add "$address/24" dev eth0
    nsenter --target "$peer" --net ip link set eth0 up
  fi
}

be_host() {   # the first process of a host; bash also buries what its daemons leave behind
  local name=$1 daemon
  hostname "$name"
  mount --bind "$folder/hosts" /etc/hosts
  mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
  ip link set lo up
  if [ "$name" = "$CONTROLLER" ]; then
    ip link add br0 type bridge
    ip addr add "$NET.254/24" dev br0
    ip link set br0 up
    munged --force --foreground --socket="$folder/munge.sock" --key-file="$folder/munge.key" \
      --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" &
    until [ -S "$folder/munge.sock" ]; do sleep 0.02; done
    daemon=(slurmctld -D)
  else
    until ip -o -4 addr show dev eth0 2> /dev/null | grep -q inet; do sleep 0.02; done
    daemon=(slurmd -D -N "$name")
  fi
  "${daemon[@]}" &
  while :; do wait -n || true; sleep 1; done
}

on() {   # a command on a host, in the folder where we are
  local name=$1; shift
  # shellcheck disable=SC2016
  nsenter --target "$(cat "$folder/$name.pid")" --net --uts --mount --pid sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
}

stop_host() {
  local pid; pid=$(cat "$folder/$1.pid")
  kill -9 "$pid" 2> /dev/null || true
  while kill -0 "$pid" 2> /dev/null; do sleep 0.05; done
  rm -f "$folder/$1.pid"
}

wait_for_idle() {   # all nodes are there; one that has just come back may get its job at once
  local idle expected; expected=$(wc -l < "$folder/nodes.conf")
  for _ in $(seq 300); do
    idle=$(on "$CONTROLLER" sinfo -h -N -o '%N %t' 2> /dev/null | sort -u | grep -Ec ' (idle|alloc|mix|comp)$' || true)
    [ "$idle" -ge "$expected" ] && return
    sleep 0.1
  done
  echo "cluster.sh: not all nodes came up; see $folder/*.log" >&2
  return 1
}

down() {
  local pidfile
  trap - EXIT
  for pidfile in "$folder"/*.pid; do
    [ "$pidfile" = "$folder/munged.pid" ] || { [ -e "$pidfile" ] && stop_host "$(basename "$pidfile" .pid)"; }
  done
}

main "$@"; exit
