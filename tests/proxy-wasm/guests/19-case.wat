(on request_headers
  (call $show @X-Foo@ (call $get_header_map_value #0 @X-Foo@ OUT))
  (call $show @host@ (call $get_header_map_value #0 @host@ OUT))
  (call $show @:authority@ (call $get_header_map_value #0 @:authority@ OUT))
  (call $show @:method@ (call $get_header_map_value #0 @:method@ OUT))
  (call $show @:path@ (call $get_header_map_value #0 @:path@ OUT))
  (call $show @:scheme@ (call $get_header_map_value #0 @:scheme@ OUT))
  #0)
