#!/usr/bin/env bash
# Build on a Ray cluster, as a job that is submitted from anywhere.
#
#     RAY_ADDRESS=http://head:8265 ./ray-job.sh /shared/chats --tokenizer Qwen/Qwen3-8B \
#         --output /shared/build
#
# The arguments are those of `sftprep build`. All machines of the cluster must reach the inputs and
# the output under the same paths, and have sftprep with the extra `ray`. The job is the driver: it
# needs one core and 1 GB, and reads none of the inputs. After a failure, run it again: what is done
# is kept. Not run as a submitted job; `pytest -m ray` runs such builds on a cluster of two machines.
set -euo pipefail

ray job submit --address "${RAY_ADDRESS:?the address of the dashboard, http://HOST:8265}" \
    --entrypoint-num-cpus 1 -- \
    sftprep build "$@" --executor ray --ray-address auto
