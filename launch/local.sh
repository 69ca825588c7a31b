#!/usr/bin/env bash
# Trains on this machine and starts again what was interrupted:
#
#   ./launch/local.sh --config=configs/shapes.py --workdir=runs/first --config.data.path=data/shapes
#
# Takes the flags of `python -m mmdit_jax.train`. PROCESSES=2 runs that many processes, which find
# each other on a free port. When one fails, all end; then all start again, unless it was a user's
# mistake. RESTARTS=3 is how often that may happen without a newer checkpoint in between (counted in
# steps, never in time). SIGTERM (or Ctrl-C) is passed on, and then nothing is started again.
#
# Exit code: 0 done; 2 a mistake; otherwise the worst of the last attempt (75 and 128 or more: the
# same command again may help).
set -uo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

processes="${PROCESSES:-1}" restarts="${RESTARTS:-3}"
[[ $processes =~ ^[1-9][0-9]*$ ]] || refuse "PROCESSES=$processes must be a whole number from 1"
[[ $restarts =~ ^[0-9]+$ ]] || refuse "RESTARTS=$restarts must be a whole number from 0"
workdir="" previous=""
for word in "$@"; do
    [[ $previous =~ ^--?workdir$ ]] && workdir=$word
    [[ $word =~ ^--?workdir=(.*)$ ]] && workdir=${BASH_REMATCH[1]}
    previous=$word
done
[ -n "$workdir" ] || refuse "--workdir is missing; give a directory for this run"

if [ -z "${VIRTUAL_ENV:-}" ]; then # an environment that is active is taken as it is
    here=$PWD
    cd "$(dirname "$0")/.." || exit 1
    # shellcheck source=launch/venv.sh
    source launch/venv.sh
    cd "$here" || exit 1
fi

newest_checkpoint() { # step, or -1
    local name newest=-1
    for name in "$workdir"/checkpoints/*; do
        name=${name##*/}
        [[ $name =~ ^[0-9]+$ ]] && [ "$name" -gt "$newest" ] && newest=$name
    done
    echo "$newest"
}

free_port() { # below those that the system itself hands out
    local port=0
    until [ "$port" -gt 0 ] && ! (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do
        port=$((20000 + RANDOM % 12000))
    done
    echo "$port"
}

severity() { # of an exit code: 0 done, 1 start again, 2 start again a few times, 3 do not
    case $1 in
        0) echo 0 ;;
        1) echo 2 ;;
        75) echo 1 ;;
        *) [ "$1" -lt 128 ] && echo 3 || echo 1 ;; # 128 and more: killed by a signal
    esac
}

pids=() stopping=""
pass_on() { # what bash runs in the background ignores SIGINT, so that becomes SIGTERM too
    stopping=yes
    [ ${#pids[@]} -eq 0 ] || kill -s TERM "${pids[@]}" 2>/dev/null
}
trap pass_on TERM INT

attempt() { # starts all processes and waits for all; leaves the worst exit code in $code
    local job=() running=() pid ended deadline="" i
    [ "$processes" -eq 1 ] ||
        job=("--coordinator_address=localhost:$(free_port)" "--num_processes=$processes")
    pids=()
    for ((i = 0; i < processes; i++)); do
        python -m mmdit_jax.train "$@" "${job[@]}" ${job[0]:+"--process_id=$i"} &
        pids+=($!)
    done
    [ -z "$stopping" ] || pass_on # it came while they were being started
    code=0
    while [ ${#pids[@]} -gt 0 ]; do
        sleep 0.2
        running=()
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                running+=("$pid")
                continue
            fi
            wait "$pid"
            ended=$?
            [ "$(severity "$ended")" -gt "$(severity "$code")" ] && code=$ended
            # The others notice by themselves and say whom they miss; 30 s are for one that does not.
            [ "$ended" -eq 0 ] || deadline=${deadline:-$((SECONDS + 30))}
        done
        pids=("${running[@]}")
        if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ ${#pids[@]} -gt 0 ]; then
            kill -s KILL "${pids[@]}" 2>/dev/null
        fi
    done
}

best=$(newest_checkpoint) left=$restarts
while :; do
    attempt "$@"
    case $(severity "$code") in 0 | 3) exit "$code" ;; esac
    [ -z "$stopping" ] || exit "$code"
    newest=$(newest_checkpoint)
    if [ "$newest" -gt "$best" ]; then
        best=$newest
        # What fails for no known reason (1) is not mended by having come further.
        [ "$code" -eq 1 ] || left=$restarts
    fi
    if [ "$left" -eq 0 ]; then
        echo "error: exit code $code, $restarts restarts without progress past step $best" >&2
        exit "$code"
    fi
    left=$((left - 1))
    echo "exit code $code, newest checkpoint $newest: starting again ($left more times)" >&2
done
