(func (export "_initialize") (drop (call $get_header_map_value #0 @x@ OUT)))
