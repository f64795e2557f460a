# Sourced at the end of a batch script, with the job step's exit code: back to the queue with a job that was stopped.
# 75: the processes have saved their work, or had not begun. 128 + n: stop signal n came before they could handle it.

requeue_if_stopped() {
    case $1 in 75 | 129 | 130 | 140 | 143) ;; *) return ;; esac
    # A job that was cancelled, or is being requeued already, is no longer RUNNING.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        echo "job $SLURM_JOB_ID: stopped, back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
