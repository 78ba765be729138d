"""How frozen weights are stored: dense, nf4, fp4 and int8.

    quant.storage    StorageSpec, Storage, DenseStorage
    quant.fourbit    nf4 and fp4
    quant.int8       row-wise int8
    quant.kinds      new_storage, storage_tensors, quantise: which class keeps which kind
    quant.products   matrix products, of one matrix and grouped by expert
    quant.choices    a dtype and a device as a user names them
    quant.common     errors, files, words, progress: what every package uses

Nothing is imported here, so that `quant.common.errors` costs no torch import.
"""
