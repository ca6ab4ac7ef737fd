"""One model on several processes: data-parallel, fully sharded, tensor-parallel."""
