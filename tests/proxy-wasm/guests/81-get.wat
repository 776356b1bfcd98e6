(on request_headers (call $show @next filter@ (call $get_property @mine@ OUT)) #0)
