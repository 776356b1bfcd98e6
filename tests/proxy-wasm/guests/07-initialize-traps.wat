(func (export "_initialize") unreachable)
