"""What a program will be on a cluster, before it is rented: compiled for GPUs that are not there, never timed.

python -m jaxfw.audit --model=llama-3.1-8b --program=train --target=h200:1x8 --mesh=fsdp=8 --workdir=runs/audit

programs   a training step, a decode step, a prefill layer as shapes on a mesh
account    what of it a device holds, and whether it fits
traffic    collectives by axis and link, kernels, the overlap of one with the other
page       the report
"""
