#!/usr/bin/env bash
# Build with an array of jobs of Slurm, and finish when all of them have succeeded.
#
#     PARTS=16 ./slurm.sh /shared/chats --tokenizer Qwen/Qwen3-8B --output /shared/build
#
# The arguments are those of `sftprep build`. All nodes must reach the inputs, the output and the
# cache of the Hub under the same paths. Download the tokenizer once before, on a node with network.
#
#   PARTS   number of jobs in the array; not more than groups (1 GiB of input each)
#   ROUNDS  how often the array runs: 1; 2 with weights in a mixture or with --duplicates drop; 3 with
#           both
#   SBATCH  more options for every job, such as "--account=A --partition=P --time=2:00:00"
#
# It prints the number of the last job. After a failure, run it again: what is done is kept.
set -euo pipefail

parts=${PARTS:-16} rounds=${ROUNDS:-1}
read -r -a options <<< "${SBATCH:---cpus-per-task=8 --mem=16G --time=4:00:00}"
printf -v build '%q ' sftprep build "$@"

after=()
for ((round = 1; round <= rounds; round++)); do
    job=$(sbatch --parsable --job-name=sftprep --array="1-$parts" "${options[@]}" "${after[@]}" \
        --wrap="$build --part \$SLURM_ARRAY_TASK_ID/$parts --workers \${SLURM_CPUS_PER_TASK:-1}")
    # A failed part cancels what follows, so that nothing is finished by accident.
    after=(--dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes)
done
sbatch --parsable --job-name=sftprep-finish "${options[@]}" "${after[@]}" --wrap="$build"
