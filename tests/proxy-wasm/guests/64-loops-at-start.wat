(func (export "_initialize") (loop $for_ever (br $for_ever)))
