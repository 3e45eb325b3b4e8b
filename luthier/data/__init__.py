"""From records to batches: read, recognise, render with exact loss weights, keep, order, pack, collate, account."""
