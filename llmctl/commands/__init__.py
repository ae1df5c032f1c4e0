"""One file per subcommand: flags -> config -> one engine call -> the result on stdout."""
