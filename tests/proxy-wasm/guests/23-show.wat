(on request_headers
  (call $show @path@ (call $get_header_map_value #0 @:path@ OUT))
  (call $show @authority@ (call $get_header_map_value #0 @:authority@ OUT))
  (call $show @method@ (call $get_header_map_value #0 @:method@ OUT))
  #0)
