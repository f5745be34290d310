"""A run as a Kubernetes Indexed Job: one pod a node, which find one another through a headless service."""

import json
import re
from dataclasses import dataclass

from dsv3_jax.config import ConfigError
from dsv3_jax.launch.processes import ADDRESS, COUNT, INDEX
from dsv3_jax.launch.training import STOPPED, Training

_PORT = 55527

_MANIFEST = """\
# kubectl apply -f this file. The pods reach one another as {name}-0.{name}, {name}-1.{name}, ...
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimit: {retries}
  podFailurePolicy:
    rules:
    # Preempted, drained or evicted, or stopped by SIGTERM with everything saved: goes on, and is not counted.
    - action: Ignore
      onPodConditions:
      - type: DisruptionTarget
    - action: Ignore
      onExitCodes:
        operator: In
        values: [{stopped}]
    # An error in the settings is the same at every try.
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2]
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      terminationGracePeriodSeconds: {save_seconds}
      containers:
      - name: train
        image: {image}
        command: {command}
        env:
        - name: {address_name}
          value: {name}-0.{name}:{port}
        - name: {count_name}
          value: "{nodes}"
        - name: {index_name}
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
{resources}        volumeMounts:
        - name: runs
          mountPath: {mount}
        - name: shared-memory
          mountPath: /dev/shm
      volumes:
      - name: runs
        persistentVolumeClaim:
          claimName: {claim}
      - name: shared-memory
        emptyDir:
          medium: Memory
"""
_RESOURCES = """\
        resources:
          limits:
            nvidia.com/gpu: {gpus}
"""


@dataclass(frozen=True)
class KubernetesJob:
    """What the job asks for."""

    nodes: int
    gpus_per_node: int
    image: str
    claim: str
    """Name of the PersistentVolumeClaim that all pods can write to and that holds the run."""
    mount: str
    """Where it appears in the pods; the output folder lies in it."""
    save_seconds: int
    """Seconds that a pod gets to save after SIGTERM."""


def manifest(training: Training, job: KubernetesJob) -> str:
    """The manifest of a run. Raises ConfigError where the output folder would be lost with the pod."""
    if not training.output_dir.is_relative_to(job.mount):
        raise ConfigError(
            f"--output-dir {training.output_dir}: lies outside {job.mount}, where the pods share --claim {job.claim}; "
            f"choose a folder in {job.mount}, or change --mount"
        )
    return _MANIFEST.format(
        name=job_name(training.output_dir.name),
        nodes=job.nodes,
        retries=10 * job.nodes,
        stopped=STOPPED,
        save_seconds=job.save_seconds,
        image=json.dumps(job.image),
        command=json.dumps(_command(training)),
        address_name=ADDRESS,
        count_name=COUNT,
        index_name=INDEX,
        port=_PORT,
        resources=_RESOURCES.format(gpus=job.gpus_per_node) if job.gpus_per_node else "",
        mount=json.dumps(job.mount),
        claim=json.dumps(job.claim),
    )


def _command(training: Training) -> list[str]:
    """As the image has it: the config where the user says it is; pods may start minutes apart."""
    patience = [] if training.sets("parallel.start-timeout") else ["--parallel.start-timeout", "600"]
    return [*training.command(training.file, python="python"), *patience]


def job_name(text: str) -> str:
    """A name that Kubernetes allows: at most 52 small letters, digits and hyphens, a letter first."""
    name = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:52].rstrip("-")
