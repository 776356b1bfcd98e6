(on configure unreachable)
