"""Objects of transformers: names, linears, decoder blocks, replay of one block. No files of ours."""
