"""Running an unmodified module with its ops divided over ranks: tensor, sequence and context parallelism.

model and loss on fake tensors -> `Trace` (ATen ops in order) -> one pass per axis -> a trace of what one rank does on local
tensors, collectives written out -> `Program`, plain generated Python that autograd differentiates.
"""
