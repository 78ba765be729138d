"""Where tensors live: the processes of a run, and which of them holds which part of a model.

    parallel.world      the processes, what they reduce and wait for together
    parallel.mesh       replicate × expert × shard
    parallel.plan       what is gathered together, and how every tensor is cut
    parallel.fsdp       cutting a model as the plan says
    parallel.shards     what this process holds of it
    parallel.exchange   tokens travel to the experts that other processes own

docs/architecture.md names the others. Nothing is imported here: FSDP2 costs a second that one process needn't wait.
"""
