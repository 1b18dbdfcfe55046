"""The Lightning shell: module, data, callback, progress, logs and the command line; the only importer of lightning."""
