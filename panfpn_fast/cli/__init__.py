"""The command line. It parses arguments and prints; everything else is in the packages below."""
