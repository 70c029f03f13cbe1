"""`xfuser serve`: the server. The ranks' side of it is in `otil_xdit.serve.ranks`; nothing else here imports torch."""
