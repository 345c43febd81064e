"""The chunk engine: the only autograd Functions and custom operators of the library.

The engine knows row statistics, not losses. Imports inside it point down only:

    flops                                         the numbers of operations of our operators
    token_chunks, vocab_chunks                    statistics and losses of a linear head, each a loop over chunks
    divergence_chunks                             two distributions, in such a loop
    logits, divergence_logits, probability_logits the same for logits that exist already
    gradients                                     where chunks add up dH, dW and db, and how autograd gets them
    bodies, divergence_bodies, ...                the elementwise mathematics of one chunk
    gemm                                          GEMMs that write into given tensors
    execution, operators                          how a body runs; what the compiler sees of a loop
    statistics, plan                              what loops return; how long their chunks are
"""
