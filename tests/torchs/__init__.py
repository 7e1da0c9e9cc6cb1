"""The suites that `make test-torch` runs on a version of torch, and the table in docs/torch.md that its results make."""
