#!/usr/bin/env bash
# One job for each line of a file, one after the other:
#
#   CONFIG=configs/mmdit.py:resolution=256 WORKDIR=runs/depths ./launch/sweep.sh LINES [FLAGS]
#
# A line holds flags of `python -m mmdit_jax.train` and arguments of the config:
#
#   depth=15 --config.optimizer.learning_rate=3e-4
#   depth=18
#
# and is split as a shell would: 'variant=rf/lognorm(0.00, 1.00)' is one word. `python -m
# mmdit_jax.sweep --launch` prints such a file, and collects the results when all have run.
#
# Its workdir is WORKDIR/NAME, where NAME is made of the line. FLAGS are added to every job. LAUNCH is
# what runs a job: launch/local.sh; "sbatch launch/slurm.sbatch" and launch/gke.sh (with NAME=%s in the
# environment, which becomes that of the line) return at once, so that the jobs run side by side.
# --dry-run prints the commands of all jobs. Lines that begin with # are left out. A job that fails
# does not keep the others from running; the exit code is the one that decides (see contract.sh).
set -uo pipefail
lines="${1:-}"
[ -f "$lines" ] || {
    echo "error: ${lines:-a file} is missing; the first argument is a file with one job a line" >&2
    exit 2
}
shift
here=$(realpath "$(dirname "$0")")
# shellcheck source=launch/contract.sh
source "$here/contract.sh"
[ -n "${CONFIG:-}" ] && [ -n "${WORKDIR:-}" ] || refuse "CONFIG and WORKDIR must be set for a sweep"
read -r -a launch <<<"${LAUNCH:-$here/local.sh}"

code=0 known=" "
while read -r -u 3 line || [ -n "$line" ]; do
    [[ -n $line && $line != \#* ]] || continue
    split=$(xargs -n1 printf '%s\n' <<<"$line") || refuse "a quote is open in the line: $line"
    mapfile -t words <<<"$split"
    config=$CONFIG own=()
    for word in "${words[@]}"; do
        if [[ $word == -* ]]; then
            own+=("$word")
        elif [[ $config == *:* ]]; then
            config+=",$word"
        else
            config+=":$word"
        fi
    done
    name=$(printf '%s\n' "${words[@]}" | sed 's/^-*//; s/^config\.//; s/[^A-Za-z0-9._]/-/g')
    name=${name//$'\n'/_}
    [[ $known != *" $name "* ]] || refuse "two lines have the same name $name; make them differ"
    known+="$name "
    echo "== $name" >&2
    env CONFIG="$config" WORKDIR="$WORKDIR/$name" \
        ${NAME:+"NAME=${NAME//%s/${name//[^a-z0-9]/-}}"} \
        "${launch[@]}" ${dry_run:+--dry-run} "${own[@]}" "${flags[@]}"
    ended=$?
    [ "$ended" -eq 0 ] || echo "$name ended with exit code $ended" >&2
    code=$(worse "$code" "$ended")
done 3<"$lines"
exit "$code"
