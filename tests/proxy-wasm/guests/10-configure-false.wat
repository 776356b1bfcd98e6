(on configure #0)
