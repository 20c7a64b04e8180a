#!/bin/bash
# Training on several machines under Slurm; sbatch docs/slurm.sh. Preempted or timed out, the job saves and is queued again.
#SBATCH --job-name=lwd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

LATENTS=${LATENTS:?directory of the latents}
OUT=${OUT:?directory of the run}
RECIPE=${RECIPE:-imagenet-xl-200ep}
SCHEDULE=${SCHEDULE:?schedule file that lwd probe made, or offset, synchronous ...}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Time to write a checkpoint after SIGTERM, less than Slurm gives; torchrun's own is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m lwd train --latents "$LATENTS" --out "$OUT" --recipe "$RECIPE" --schedule "$SCHEDULE"
code=$?
# 143: SIGTERM came and a checkpoint was written.
if [ $code -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
