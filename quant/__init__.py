"""How frozen weights are stored: dense, nf4, fp4 and int8.

    quant.storage    StorageSpec, Storage, new_storage, storage_tensors, quantise
    quant.fourbit    nf4 and fp4
    quant.int8       row-wise int8
    quant.products   matrix products, of one matrix and grouped by expert
    quant.errors     NibbleError

Nothing is imported here, so that `quant.errors` costs no torch import.
"""
